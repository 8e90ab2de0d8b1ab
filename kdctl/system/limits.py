"""Bounds of time and memory for code that came with a model's files and may never end."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def limited(seconds: float, more_bytes: int) -> Iterator[None]:
    """Raise TimeoutError or MemoryError where a block takes longer, or more memory than it found taken.

    Time is watched in the main thread only, memory where the system says how much is taken.
    """
    with _alarm(seconds), _address_space(more_bytes):
        yield


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _address_space(more_bytes: int) -> Iterator[None]:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + more_bytes
    limit = min(one for one in (wanted, soft, hard) if one != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
