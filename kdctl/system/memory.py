"""The machine's memory: how much there is, and what was freed and is still held."""

import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

import psutil
import torch


def freeze_imports() -> None:
    """Take all objects that exist out of every later garbage collection; call it before any model exists.

    After the imports they are some 400,000 of libraries' own, which a collection would walk in 0.2 to 0.5 s.
    """
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Return freed memory to the device's driver and, where the C library can, to the operating system.

    Both torch's allocator and glibc would keep it for the next large tensor.
    """
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if sys.platform != "linux":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # another C library
        return
    trim(0)


def spare_bytes(processes: int = 1) -> int:
    """Return what is free beside this process at its largest so far, if others of ``processes`` take as much."""
    now = psutil.Process().memory_info().rss
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    free = min(psutil.virtual_memory().available, machine_bytes() - processes * now)
    return free // processes - max(0, largest - now)


def machine_bytes() -> int:
    """Return the memory that this process may use: the machine's, or less where its container has a limit."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return there
    return min(there, int(limit)) if limit.isdigit() else there
