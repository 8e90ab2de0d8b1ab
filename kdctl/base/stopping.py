"""Ctrl-C, SIGTERM and SIGHUP: the first ends the work in order, and those that follow change nothing.

Libraries may swallow it, in hooks and callbacks, so it is raised again until somebody notices. Whatever is cut off,
files on disk are whole: where the main thread does not come back at all the process ends from outside, after
``GRACE_S``.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 8.0
AGAIN_S = 1.5
PARENT = "KDCTL_PARENT"
"""Variable that names the process without which one that it started is to end."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in dir(signal))
WHY = {"SIGINT": "stopped", "SIGTERM": "stopped by SIGTERM", "SIGHUP": "stopped, because the terminal is gone (SIGHUP)"}


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end. code: what it then exits with."""

    def __init__(self, number: int):
        super().__init__(WHY.get(signal.Signals(number).name, "stopped"))
        self.code = 128 + number


class _State:
    """What this process was told."""

    received = 0
    held = False
    noticed = False
    again = False


def listen(last_words: Callable[[Stopped], None]) -> None:
    """Have the first signal raise ``Stopped`` in the main thread. Signals that are ignored stay so, as under nohup.

    last_words: called before the process is ended from outside.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(reading, last_words), daemon=True).start()


def received() -> Stopped | None:
    """Return the signal that was received, if any."""
    return Stopped(_State.received) if _State.received else None


def notice() -> None:
    """Tell that the stop has arrived where it is handled, so that it is not raised again."""
    _State.noticed = True


def finish() -> None:
    """Let no signal disturb the end of the process any more."""
    notice()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # other handlers are gone before the interpreter is


@contextmanager
def held() -> Iterator[None]:
    """Put a signal off until a block has ended, which would leave behind what the block starts."""
    _State.held = True
    try:
        yield
    finally:
        _State.held = False
    if _State.received:
        raise Stopped(_State.received)


def end_with(parent: int) -> None:
    """End this process, as SIGTERM does, once its parent is gone."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


def _on_signal(number: int, _: FrameType | None) -> None:
    if _State.received and not _State.again:
        return
    _State.received, _State.again = _State.received or number, False
    if not (_State.held or _State.noticed):
        raise Stopped(_State.received)


def _watch(reading: int, last_words: Callable[[Stopped], None]) -> None:
    """Wait for the first signal, which is told here even where the main thread does not run Python."""
    while (number := os.read(reading, 1)[0]) not in SIGNALS:
        pass
    until = time.monotonic() + GRACE_S
    while time.monotonic() < until:
        time.sleep(AGAIN_S)
        if not _State.noticed:
            _State.again = True
            _thread.interrupt_main(signal.Signals(number))
    stopped = Stopped(_State.received or number)
    last_words(stopped)
    os._exit(stopped.code)


def _forget() -> None:
    """Give a forked process its defaults back: it must not tell this one what happens to it."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
