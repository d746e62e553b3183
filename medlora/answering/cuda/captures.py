"""A step as a CUDA graph: recorded once, then launched as one piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

Replay = Callable[[], None]


class HasStep(Protocol):
    """What is recorded: a decoder."""

    def compute_step(self) -> None:
        """Work that reads and writes device memory alone."""


class Capture(Protocol):
    """How a step is recorded; tests without CUDA have a stand-in."""

    def watching(self) -> AbstractContextManager[None]:
        """Where a step runs before it is recorded; raises RuntimeError when it makes the host wait for the device."""

    def record(self, decoder: HasStep) -> Replay:
        """The step of the decoder's present shape; running it again does the same work on the same memory."""


class CudaCapture:
    """Graphs of one decoder share memory: they run one after the other and leave nothing behind but its state."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """On the stream of the captures, where libraries keep handles and workspaces of their own.

        What waits for the device cannot be captured, and a capture that fails leaves torch's allocator in doubt. So it is
        found before: torch raises at whatever would wait.
        """
        before = torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                torch.cuda.set_sync_debug_mode("error")
                yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, decoder: HasStep) -> Replay:
        """Nothing is computed here: the graph is."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads of the process (Ray, pinning) ask of CUDA meanwhile does no harm.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            decoder.compute_step()
        return graph.replay
