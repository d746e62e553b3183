"""What this process works at, for those who watch it: words for the work, and a counter that moves with it."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Pulse:
    """The work of a process at one moment."""

    count: int = 0
    doing: str = ""
    """Empty while the process waits for work."""
    slow: bool = False
    """The work is known to be long and without steps: reading data, loading a model, compiling it."""
    thread: tuple[str, int, int] = ("", 0, 0)
    """Name, identity and native id of the thread that works."""


_now = Pulse()


def begin(doing: str, slow: bool = False) -> None:
    """Report the work that begins now; an empty text means that there is none."""
    global _now
    me = threading.current_thread()
    _now = Pulse(_now.count + 1, doing, slow, (me.name, me.ident or 0, me.native_id or 0))


def beat() -> None:
    """Report that the same work has made progress."""
    global _now
    _now = Pulse(_now.count + 1, _now.doing, _now.slow, _now.thread)


def read() -> Pulse:
    """The work at this moment."""
    return _now
