"""One task in a process of its own beside the driver, which may fail or be cancelled without harm to the driver."""

from __future__ import annotations

from collections.abc import Callable

import ray

from medlora.errors import InputError
from medlora.on_ray.inbox import beside_driver


class BackgroundTask:
    """A function that runs in another process on the driver's node; its result is what it writes, not what it returns."""

    def __init__(self, function: Callable[..., None], *arguments: object) -> None:
        self._task = ray.remote(max_retries=0, **beside_driver())(function).remote(*arguments)

    def has_ended(self) -> bool:
        """Whether the function has returned, raised, or died with its process."""
        return bool(ray.wait([self._task], timeout=0)[0])

    def find_failure(self) -> str | None:
        """The first line of why an ended task failed; None where it did what it should."""
        try:
            ray.get(self._task)
        except (ray.exceptions.RayError, InputError, RuntimeError, OSError) as error:
            return (str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__])[0]
        return None

    def cancel(self, wait_s: float = 30) -> None:
        """Kill the process and wait until it is gone."""
        ray.cancel(self._task, force=True)
        ray.wait([self._task], timeout=wait_s)
