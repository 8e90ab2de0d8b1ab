"""Locks in a run folder: one sweep at a time, one process a shared stage or variant.

They are kernel locks on files, so that the lock of a process that died is free at once, and are only advice on volumes
whose server does not share them between hosts; there the fixed share of each shard still keeps trials apart.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kdctl.base.errors import StoreError
from kdctl.run.files import make_folder, remove
from kdctl.run.record_files import read_record, write_record
from kdctl.sweep.records import Holder

MOMENT_S = 1.0  # another shard that starts at the same time holds a lock for a moment, to see that it is free


def _holder(path: Path) -> str:
    """Say who holds a lock, from the note beside it."""
    try:
        found = read_record(path.with_suffix(".json"), Holder)
    except (OSError, StoreError):
        return "another process"
    return f"process {found.pid} on {found.host} since {found.since}"


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Hold a lock, waiting for whoever has it."""
    make_folder(path.parent)
    with FileLock(path):
        yield


@contextmanager
def only_sweep(folder: Path, name: str, shard: str = "") -> Iterator[None]:
    """Hold a run folder for a sweep, or a shard of it; shards of one sweep share the folder.

    folder: where the locks are. Raises StoreError, naming the holder, if the shard or another sweep runs there.
    """
    make_folder(folder)
    own = folder / (f"{name}@{shard}.lock" if shard else f"{name}.lock")
    with _taken(own, f"{'shard ' + shard + ' of ' if shard else ''}sweep {name}"):
        note = own.with_suffix(".json")
        write_record(note, Holder(pid=os.getpid(), host=socket.gethostname(), since=_now()))
        try:
            for other in sorted(folder.glob("*.lock")):
                holder = other.stem.partition("@")[0]
                if holder != name:
                    with _taken(other, f"sweep {holder}"):
                        pass
            yield
        finally:
            remove(note)


@contextmanager
def _taken(path: Path, what: str) -> Iterator[None]:
    """Hold a lock that must be free."""
    lock = FileLock(path, timeout=MOMENT_S)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"{what} runs in {path.parent.parent.parent} already: {_holder(path)}; two at once would do the same work "
            "twice. Wait for it, stop it, or choose another folder with --run"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
