"""Events from workers, delivered to the driver in order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from medlora import endings
from medlora.events import Event, OnEvent


def beside_driver() -> dict[str, object]:
    """Options of a helper actor that must not be lost with a worker's node: it lives and dies with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


@contextmanager
def listen(on_event: OnEvent) -> Iterator[Inbox]:
    """An inbox that workers put plain dicts into; each is handed to `on_event` in a thread of the driver, in order."""
    inbox = Inbox(beside_driver())
    failures: list[Exception] = []

    def deliver() -> None:
        try:
            while (event := ray.get(inbox.actor.get.remote())) is not None:
                try:
                    if not failures:
                        on_event(event)
                except Exception as error:  # raised where the driver listens, not as a traceback of this thread
                    failures.append(error)
        except ray.exceptions.RayError:
            if not endings.is_ending():  # which takes the inbox away
                raise

    thread = threading.Thread(target=deliver, name="medlora-inbox", daemon=True)
    thread.start()
    try:
        yield inbox
    finally:
        if not endings.is_ending():
            ray.get(inbox.actor.put.remote(None))
            thread.join(timeout=10)
            ray.kill(inbox.actor)
    if failures:
        raise failures[0]


class _Mailbox:
    """The actor between a driver and its workers: their events, and the driver's wish that they leave."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.leave = asyncio.Event()

    async def put(self, event: Event | None) -> None:
        await self.events.put(event)

    async def get(self) -> Event | None:
        return await self.events.get()

    async def ask_to_leave(self) -> None:
        self.leave.set()

    async def wait_to_leave(self) -> None:
        await self.leave.wait()


class Inbox:
    """Where workers put what happens, an actor with these options; travels to them."""

    def __init__(self, options: Mapping[str, object]) -> None:
        self.actor = ray.remote(**options)(_Mailbox).remote()

    def put(self, event: Event) -> None:
        """Hand over an event, a plain dict; returns once it has arrived."""
        ray.get(self.actor.put.remote(event))

    def ask_to_leave(self) -> None:
        """Ask the workers that watch for it (`leaving.watch_inbox`) to make a checkpoint and return."""
        ray.get(self.actor.ask_to_leave.remote())
