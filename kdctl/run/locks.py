"""Locks on the results of a run folder and a cache: one process makes a result, another waits and finds it made.

They are kernel locks on files, so that the lock of a process that died is free at once. Each file says who holds it. On
a volume that has no locks, or does not share them between hosts, they are advice that nobody hears.
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from kdctl.run.files import make_folder
from kdctl.run.paths import cache_dir

LOOK_EVERY_S = 0.1
HELD = {errno.EAGAIN, errno.EACCES}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What volumes without locks say."""
Say = Callable[[str], None]


class Busy(Exception):
    """Another process holds a lock; the text says which."""


def lock_of(place: Path) -> Path:
    """Return the file that is locked while something is written at a place of the user's: none that lies beside it."""
    return cache_dir() / ".locks" / f"{hashlib.sha256(os.fsencode(place.resolve())).hexdigest()[:16]}.lock"


@contextmanager
def holding(path: Path, what: str, say: Say, longest_s: float | None = None) -> Iterator[None]:
    """Hold a lock, waiting for whoever has it and saying so once.

    what: what is guarded, and where it lies; longest_s: raise Busy after so many seconds.
    """
    handle = _open(path)
    try:
        if handle is not None:
            _wait(handle, path, what, say, longest_s)
        yield
    finally:
        if handle is not None:
            os.close(handle)


class Use:
    """A folder that this process uses, as long as the object lives."""

    def __init__(self, path: Path):
        self._handle = _open(path)
        if self._handle is not None:
            with suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_SH)

    def sole(self) -> bool:
        """Tell whether no other process uses the folder; if so none begins to while the object lives."""
        if self._handle is None:
            return False
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def __del__(self) -> None:
        """Let the folder go."""
        if self._handle is not None:
            os.close(self._handle)


def _open(path: Path) -> int | None:
    """Open the file of a lock; None where nothing can be written, so that there is nothing to guard either."""
    try:
        make_folder(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return None


def _wait(handle: int, path: Path, what: str, say: Say, longest_s: float | None) -> None:
    """Take a lock as soon as it is free, and sign it."""
    started, told = time.monotonic(), longest_s is not None
    while not _taken(handle, path, say):
        if longest_s is not None and time.monotonic() - started >= longest_s:
            raise Busy(holder(path))
        time.sleep(LOOK_EVERY_S)
        if not told:
            say(f"waiting: {holder(path)} is at work on {what}")
            told = True
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(mine).encode(), 0)
    except OSError:
        return  # a full disk: the lock holds all the same


def _taken(handle: int, path: Path, say: Say) -> bool:
    """Try to take a lock once."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(path)) from None
        say(f"the volume of {path} has no locks ({error.strerror}): let no two processes work in one folder")
    return True


def holder(path: Path) -> str:
    """Say who holds a lock."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} (since {found['since']})"
    except (OSError, ValueError, TypeError, LookupError):
        return "another process"
