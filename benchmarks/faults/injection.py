"""Faults at file events: every event below a folder is counted, and the chosen one dies, tears, fails or loses the power.

Events are what Python does to files (open for writing, write, fsync, rename, remove, make and remove folders) and
`torch.save`, which writes by itself. `arm` cannot be undone: call it in a fork.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILL, TEAR, POWER = "kill", "tear", "power"
"""Die before the event; die with half of what was to be written; die, and lose what was never synced."""
_TORCH_WORDS = (
    "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0: file write failed"
)


class Injector:
    """Counts events below `folder` in `events`; at event `at` (from 1) does `fault`: one of the above, or an errno."""

    def __init__(self, folder: Path, at: int | None, fault: str | int = KILL) -> None:
        self.folder, self.at, self.fault = os.path.abspath(folder), at, fault
        self.events: list[tuple[str, str]] = []
        self.durable: dict[str, bytes | None] = {}
        """The content of each written file that a power cut leaves; None: the file is gone."""
        self.dirty: set[str] = set()
        self.removing = False
        self.on = False

    def arm(self) -> None:
        """Patch this process for good."""
        self.on = True
        real_open = builtins.open
        self.read = lambda path: self._quietly(lambda: real_open(path, "rb").read() if os.path.exists(path) else None)

        def open_file(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
            if not self._concerns(file) or not set(mode) & set("wax+"):
                return real_open(file, mode, *more, **options)
            path = os.path.abspath(file)
            self._count("open", path)
            self.durable.setdefault(path, self.read(path))
            if set(mode) & set("wax"):
                self.dirty.add(path)
            return _File(real_open(file, mode, *more, **options), path, self)

        builtins.open = io.open = open_file  # type: ignore[assignment]
        for name in ("mkdir", "rmdir", "remove", "unlink", "rename", "replace"):
            self._patch(os, name, self._rename if name in ("rename", "replace") else None)
        real_os_open, real_fsync = os.open, os.fsync

        def os_open(path: Any, flags: int, *more: Any, **options: Any) -> int:
            if self._concerns(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._count("open", os.path.abspath(path))
            return real_os_open(path, flags, *more, **options)

        def fsync(file: Any) -> None:
            path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
            if self._concerns(path):
                self._count("fsync", path)
            real_fsync(file)
            if path in self.dirty:
                self.dirty.discard(path)
                self.durable[path] = self.read(path)

        os.open, os.fsync = os_open, fsync
        real_rmtree = shutil.rmtree

        def rmtree(path: Any, *more: Any, **options: Any) -> None:
            self.removing = self._concerns(path)
            try:
                real_rmtree(path, *more, **options)
            finally:
                self.removing = False

        shutil.rmtree = rmtree  # type: ignore[assignment]
        self._patch_torch()

    def _patch(self, module: Any, name: str, after: Callable[..., None] | None) -> None:
        real = getattr(module, name)

        def patched(path: Any, *more: Any, **options: Any) -> Any:
            inside = self._concerns(path) or (self.removing and "dir_fd" in options)
            if inside:
                self._count(name, os.path.basename(path) if "dir_fd" in options else os.path.abspath(path))
            result = real(path, *more, **options)
            if inside and after:
                after(os.path.abspath(path), os.path.abspath(more[0]))
            return result

        setattr(module, name, patched)

    def _patch_torch(self) -> None:
        torch = sys.modules.get("torch")
        if torch is None:
            return
        real_save = torch.save

        def save(content: Any, file: Any, *more: Any, **options: Any) -> Any:
            if not isinstance(file, str | os.PathLike) or not self._concerns(file):
                return real_save(content, file, *more, **options)
            path = os.path.abspath(file)
            self.durable.setdefault(path, self.read(path))
            self.dirty.add(path)

            def half() -> None:
                real_save(content, file, *more, **options)
                os.truncate(path, os.path.getsize(path) // 2)

            self._count("torch.save", path, half, RuntimeError(_TORCH_WORDS))
            return real_save(content, file, *more, **options)

        torch.save = save

    def _concerns(self, path: Any) -> bool:
        if not self.on or not isinstance(path, str | os.PathLike):
            return False
        full = os.path.abspath(path)
        return full == self.folder or full.startswith(self.folder + os.sep)

    def _rename(self, source: str, target: str) -> None:
        if source in self.dirty:  # the name is new, the data was never synced: an empty file
            self.dirty.discard(source)
            self.dirty.add(target)
            self.durable[target] = b""
        else:
            self.durable[target] = self.durable.get(source, self.read(target))
            self.dirty.discard(target)

    def _quietly(self, act: Callable[[], Any]) -> Any:
        was, self.on = self.on, False
        try:
            return act()
        finally:
            self.on = was

    def _count(self, kind: str, path: str, half: Callable[[], None] | None = None, error: Any = None) -> None:
        self.events.append((kind, os.path.basename(path)))
        if len(self.events) != self.at:
            return
        if isinstance(self.fault, int):
            if half is not None:
                self._quietly(half)
            raise error or OSError(self.fault, os.strerror(self.fault), path if kind != "write" else None)
        if self.fault == TEAR and half is not None:
            self._quietly(half)
        if self.fault == POWER:
            self.cut_power()
        os._exit(137)

    def cut_power(self) -> None:
        """Leave of every file what was synced last."""
        self.on = False
        for path in sorted(self.dirty):
            was = self.durable.get(path)
            if was is not None:
                with builtins.open(path, "wb") as file:
                    file.write(was)
            elif os.path.exists(path):
                os.remove(path)


class _File:
    """A file opened for writing; each write is an event."""

    def __init__(self, file: Any, path: str, injector: Injector) -> None:
        self._file, self._path, self._injector = file, path, injector

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *details: Any) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        """Count, then write."""

        def half() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        self._injector._count("write", self._path, half)
        self._injector.dirty.add(self._path)
        return int(self._file.write(content))
