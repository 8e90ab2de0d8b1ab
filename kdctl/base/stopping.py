"""Ctrl-C, SIGTERM and SIGHUP: the first ends the work in order, and those that follow change nothing.

Libraries may swallow it, in hooks and callbacks, so it is raised again until somebody notices. Whatever is cut off,
files on disk are whole: where the main thread does not come back at all the process ends from outside, after
``GRACE_S``.

Schedulers that take a machine away send SIGTERM or, when told to, SIGUSR1, and wait. Within ``put_off`` these two only
ask: the work looks at ``asked`` where it can stop without a loss, and ends by ``preempt`` there. No clock runs
meanwhile, for only the scheduler knows how long it waits.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

GRACE_S = 8.0
AGAIN_S = 1.5
ONE_REQUEST_S = 5.0
"""SIGTERM within so many seconds of the first is that one again: a launcher passes on what its whole group was sent."""
LATER = 75
"""EX_TEMPFAIL of sysexits.h: the same command, later, goes on."""
PARENT = "KDCTL_PARENT"
"""Variable that names the process without which one that it started is to end."""
ASKING = (signal.SIGTERM, signal.SIGUSR1)
SIGNALS = (signal.SIGINT, *ASKING, signal.SIGHUP)
WHY = {
    "SIGTERM": "stopped by SIGTERM",
    "SIGUSR1": "stopped by SIGUSR1",
    "SIGHUP": "stopped, because the terminal is gone (SIGHUP)",
}


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end. code: what it then exits with."""

    def __init__(self, number: int):
        super().__init__(_why(number))
        self.code = 128 + number


class Preempted(KeyboardInterrupt):
    """Work that was asked to stop did so without a loss, in every process. code: what the process exits with."""

    def __init__(self, why: str):
        super().__init__(why)
        self.code = LATER


class _State:
    """What this process was told."""

    received = 0
    asked = 0
    put_off = False
    preempted = ""
    held = False
    noticed = False
    again = False


def listen(last_words: Callable[[Stopped | Preempted], None]) -> None:
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


def received() -> Stopped | Preempted | None:
    """Return what the signal that was received means for the process, if there was one."""
    if _State.preempted:
        return Preempted(_State.preempted)
    return Stopped(_State.received) if _State.received else None


def asked() -> bool:
    """Tell whether a signal that was put off asks the process to stop."""
    return bool(_State.asked)


@contextmanager
def put_off() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 only ask while a block runs; any other signal, and SIGTERM once more, ends it as ever.

    Raises Stopped after a block that ended without seeing that it was asked.
    """
    _State.put_off = True
    try:
        yield
    finally:
        _State.put_off = False
    if _State.asked:
        _State.received = _State.received or _State.asked
        raise Stopped(_State.received)


def preempt(where: str) -> NoReturn:
    """End what stopped without a loss because a process was asked to, this one or another that it works with."""
    _State.preempted = f"{_why(_State.asked)} {where}"
    _State.received = _State.received or _State.asked or signal.SIGTERM
    raise Preempted(_State.preempted)


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
    if ended := received():
        raise ended


def end_with(starter: int) -> None:
    """End this process, as SIGTERM does, once its parent or the process that started them both is gone."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent and _lives(starter):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:  # gone, or its number is another user's by now
        return False
    return True


def _why(number: int) -> str:
    return WHY.get(signal.Signals(number).name, "stopped") if number else "stopped"


def _on_signal(number: int, _: FrameType | None) -> None:
    if not _State.again and (_State.received or (_State.put_off and number in ASKING)):
        return  # what only asks is noted by the watching thread, which knows when it came
    _State.received, _State.again = _State.received or number, False
    if not (_State.held or _State.noticed) and (ended := received()):
        raise ended


def _watch(reading: int, last_words: Callable[[Stopped | Preempted], None]) -> None:
    """Wait for the first signal that ends, which is told here even where the main thread does not run Python."""
    number = _heard(reading)
    until = time.monotonic() + GRACE_S
    while time.monotonic() < until:
        time.sleep(AGAIN_S)
        if not _State.noticed:
            _State.again = True
            signal.pthread_kill(threading.main_thread().ident or 0, number)  # ends a call that waits, too
    stopped = received() or Stopped(number)
    last_words(stopped)
    os._exit(stopped.code)


def _heard(reading: int) -> int:
    """Note the signals that ask, and return the first that ends: from when nothing is put off, all of them do."""
    first = 0.0
    while True:
        if _State.asked and not select.select([reading], [], [], AGAIN_S)[0]:
            if _State.put_off:
                continue
            return _State.asked
        number = os.read(reading, 1)[0]
        if number not in SIGNALS:
            continue
        if not (_State.put_off and number in ASKING):
            return number
        if number == signal.SIGTERM:
            if first and time.monotonic() > first + ONE_REQUEST_S:
                return number
            first = first or time.monotonic()
        _State.asked = _State.asked or number


def _forget() -> None:
    """Give a forked process its defaults back: it must not tell this one what happens to it."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
