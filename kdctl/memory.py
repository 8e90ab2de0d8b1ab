"""Memory that was freed and is still held (layer 0)."""

import ctypes
import gc
import sys


def give_back() -> None:
    """Return freed memory to the operating system where the C library can: glibc keeps it for the next large tensor."""
    gc.collect()
    if sys.platform != "linux":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # another C library
        return
    trim(0)
