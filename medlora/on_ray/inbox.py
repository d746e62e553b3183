"""What passes between a driver and its workers while they work."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import ray


class _Mailbox:
    """The actor between a driver and its workers: their events, and the driver's wish that they leave."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.leave = asyncio.Event()

    async def put(self, event: dict[str, Any] | None) -> None:
        await self.events.put(event)

    async def get(self) -> dict[str, Any] | None:
        return await self.events.get()

    async def ask_to_leave(self) -> None:
        self.leave.set()

    async def wait_to_leave(self) -> None:
        await self.leave.wait()


class Inbox:
    """Where workers put what happens, an actor with these options; travels to them."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.actor = ray.remote(**options)(_Mailbox).remote()

    def put(self, event: dict[str, Any]) -> None:
        """Hand over an event, a plain dict; returns once it has arrived."""
        ray.get(self.actor.put.remote(event))

    def ask_to_leave(self) -> None:
        """Ask the workers that watch for it (`leaving.watch_inbox`) to make a checkpoint and return."""
        ray.get(self.actor.ask_to_leave.remote())
