"""Events from workers, delivered to the driver in order, by one process beside the driver."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from medlora import endings
from medlora.events import Event, OnEvent

if TYPE_CHECKING:
    from ray.actor import ActorHandle


def beside_driver() -> dict[str, object]:
    """Options of a helper actor that must not be lost with a worker's node: it lives and dies with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


@contextmanager
def listen(on_event: OnEvent, kept: object = None) -> Iterator[Inbox]:
    """An inbox that workers put plain dicts into; each is handed to `on_event` in a thread of the driver, in order.

    `kept` is a plain object that lives beside the driver, outside of the workers, which call its methods (`Inbox.call`).
    """
    inbox = Inbox(_find_mailbox(), uuid.uuid4().hex)
    inbox.actor.keep.remote(inbox.name, kept)
    failures: list[Exception] = []

    def deliver() -> None:
        try:
            while (event := ray.get(inbox.actor.get.remote(inbox.name))) is not None:
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
            ray.get(inbox.actor.put.remote(inbox.name, None))
            thread.join(timeout=10)
            ray.get(inbox.actor.close.remote(inbox.name))
    if failures:
        raise failures[0]


_MAILBOXES: dict[tuple[str, str], ActorHandle] = {}


_FINDING = threading.Lock()


def _find_mailbox() -> ActorHandle:
    """The mailbox of this process's driver, started at the first call: phases and evaluations share the process."""
    context = ray.get_runtime_context()
    session = (context.get_node_id(), context.get_job_id())
    with _FINDING:
        if session not in _MAILBOXES:
            _MAILBOXES.clear()
            _MAILBOXES[session] = ray.remote(**beside_driver())(_Mailbox).remote()
        return _MAILBOXES[session]


@dataclass
class _Box:
    """What the mailbox has for one listener."""

    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)
    kept: object = None
    has_kept: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """The driver wants its workers to leave, or listens no more."""
    asked: bool = False


class _Mailbox:
    """The actor between a driver and its workers: their events, and the driver's wish that they leave."""

    def __init__(self) -> None:
        self.boxes: dict[str, _Box] = {}
        self.closed: set[str] = set()

    def _find(self, name: str) -> _Box:
        """The box of that name, made by whoever asks first: a worker may be faster than its driver."""
        if name in self.closed:
            raise LookupError("nobody listens any more")
        return self.boxes.setdefault(name, _Box())

    async def keep(self, name: str, kept: object) -> None:
        box = self._find(name)
        box.kept = kept
        box.has_kept.set()

    async def close(self, name: str) -> None:
        self.closed.add(name)
        self.boxes.pop(name).ended.set()

    async def put(self, name: str, event: Event | None) -> None:
        await self._find(name).events.put(event)

    async def get(self, name: str) -> Event | None:
        return await self._find(name).events.get()

    async def ask_to_leave(self, name: str) -> None:
        box = self._find(name)
        box.asked = True
        box.ended.set()

    async def wait_to_leave(self, name: str) -> bool:
        box = self._find(name)
        await box.ended.wait()
        return box.asked

    async def call(self, name: str, method: str, *given: object) -> object:
        box = self._find(name)
        await box.has_kept.wait()
        return getattr(box.kept, method)(*given)


@dataclass(frozen=True)
class Inbox:
    """Where workers put what happens, under a name of its own in the driver's mailbox; travels to them.

    Once nobody listens any more, each method raises an error of Ray's.
    """

    actor: ActorHandle
    name: str

    def put(self, event: Event) -> None:
        """Hand over an event, a plain dict; returns once it has arrived."""
        ray.get(self.actor.put.remote(self.name, event))

    def call(self, method: str, *given: object) -> Any:
        """What a method of the object that was handed to `listen` returns; calls take place one at a time."""
        return ray.get(self.actor.call.remote(self.name, method, *given))

    def ask_to_leave(self) -> None:
        """Ask the workers that watch for it (`leaving.watch_inbox`) to make a checkpoint and return."""
        ray.get(self.actor.ask_to_leave.remote(self.name))

    def wait_to_leave(self) -> bool:
        """Wait until the workers are asked to leave, or nobody listens any more: then False."""
        return bool(ray.get(self.actor.wait_to_leave.remote(self.name)))
