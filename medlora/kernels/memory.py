"""The memory of a device: how much there is, what is freed, and what the C library does with it."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a device is and how much memory it has, in bytes."""

    name: str
    total_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        return f"{self.name}, {self.free_bytes / 2**30:.1f} of {self.total_bytes / 2**30:.1f} GiB free"


def describe_device(device: str | torch.device) -> DeviceMemory:
    """The device's name, total and free memory."""
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(torch.cuda.get_device_name(device), total, free)
    memory = psutil.virtual_memory()
    return DeviceMemory(f"CPU ({platform.machine()}, {psutil.cpu_count()} cores)", memory.total, memory.available)


def clear_memory() -> None:
    """Free what nothing refers to any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Let the C library keep what tensors on the CPU free, for the next ones, instead of giving it back to the system.

    By default glibc gives large blocks back at once. Every step then pays for each of their pages again when it is
    first touched: more than the arithmetic on them. The process stays at its peak. Without glibc nothing changes.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in (_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD):
        libc.mallopt(option, value)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = (-1, 2**31 - 1), (-2, 2**26), (-3, 2**25)
"""Options of glibc's mallopt (malloc.h) and their values; 32 MiB is the largest block that it takes from the heap."""
