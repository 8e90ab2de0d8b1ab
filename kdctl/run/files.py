"""Every change of the disk: the one place where files and folders are written, moved and removed.

A reader sees the old content or the new, never half of it. What fails raises OSError with an errno and the path, also
where a library writes. Temporary names hold the host and process that made them, so that no other process takes one for
its own; what a dead one left is removed by ``sweep_up``.
"""

import errno
import glob
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil
import pyarrow as pa
from safetensors import SafetensorError

from kdctl.base.errors import brief

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[^/]*)-(?P<pid>\d+)\.(?P<kind>tmp|old)")
LIBRARY = re.compile(r"os error (?P<errno>\d+)|PytorchStreamWriter|inline_container")
"""What Rust and PyTorch say of a disk that fails, in exceptions that are no OSError."""
CLOCK_S = 2.0
"""How far the times of processes and of files may be apart."""


def before(operation: str, path: Path) -> None:
    """Do nothing before a change of the disk. Fault injection puts a function here that raises what a disk would.

    operation: mkdir, write, sync, rename or remove; also read.
    """


def sha256(path: Path) -> str:
    """Hash a file's content, hexadecimal."""
    before("read", path)
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path) -> bytes:
    """Read a file."""
    before("read", path)
    with naming(path):
        return path.read_bytes()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make every error of a disk, whatever a library raises for it, an OSError with an errno and a path.

    A file under a temporary name is named as what it is to become.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        named = getattr(error, "filename", None)
        why = os.strerror(number) if number else brief(error)
        raise OSError(number or errno.EIO, why, _known(path if named is None else named)) from error


def _known(path: Path | str | bytes) -> str:
    """Return a path with what is under a temporary name under its own."""
    parts = Path(os.fsdecode(path)).parts
    return str(Path(*(found["name"] if (found := TEMPORARY.fullmatch(part)) else part for part in parts)))


def _errno(error: Exception) -> int | None:
    """Return the number of an error of a disk, 0 where a library does not say which; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    said = LIBRARY.search(str(error))
    if said is not None:
        return int(said["errno"] or 0)
    return 0 if isinstance(error, OSError | SafetensorError | pa.ArrowException) else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let a block write a file, by a library or by itself. Raises OSError with an errno and the path."""
    with naming(path):
        before("write", path)
        yield


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there."""
    if not path.is_dir():
        with naming(path):
            before("mkdir", path)
            path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and durably."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write that becomes ``path``, durably, when the block ends without an error.

    It is dated to the nanosecond, which no clock of a file system does within a tick: whoever changes it, however soon,
    gives it another time.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file
        file.flush()
        now = time.time_ns()
        os.utime(file.fileno(), ns=(now, now))


def append(path: Path, data: bytes) -> None:
    """Add to a file durably; where that fails the file stays as it was."""
    with writing(path), open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            sync(path)
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def truncate(path: Path, size: int) -> None:
    """Cut a file off."""
    with writing(path), open(path, "r+b") as file:
        file.truncate(size)


def nameless(folder: Path) -> BinaryIO:
    """Open a file without a name in a folder; its space is free when it is closed."""
    make_folder(folder)
    with writing(folder):
        return tempfile.TemporaryFile(dir=folder)


@contextmanager
def alone(path: Path) -> Iterator[Path]:
    """Yield a folder with nothing but a link to a file, for libraries that read what lies beside a file as well."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, path.name).symlink_to(path.absolute())
        yield Path(folder)


def open_new(path: Path) -> BinaryIO:
    """Open a file that another program writes, emptied."""
    with writing(path):
        return open(path, "wb")


def temporary_name(path: Path, kind: str = "tmp") -> Path:
    """Name what becomes ``path``, or what was it, beside it; no other process makes the same name."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.{kind}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that becomes ``path`` when the block ends without an error."""
    make_folder(path.parent)
    _clear(path)
    temporary = temporary_name(path)
    try:
        with writing(temporary):
            yield temporary
        sync(temporary)
        rename(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``path`` when the block ends without an error."""
    with scratch_folder(path) as temporary:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            sync(file)
        replace_folder(temporary, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that is gone after the block, unless it was moved."""
    _clear(path)
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Move a finished folder to its place, then remove what was there; where the move fails, that stays."""
    old = temporary_name(path, "old")
    shutil.rmtree(old, ignore_errors=True)
    there = path.exists()
    if there:
        rename(path, old)
    try:
        rename(new, path)
    except OSError:
        if there and not path.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def rename(path: Path, target: Path) -> None:
    """Give a file or a folder another name, durably."""
    with naming(path):
        before("rename", target)
        os.replace(path, target)
    sync(target.parent)


def remove(path: Path) -> None:
    """Remove a file, or a folder at once: no reader sees a part of it. Missing ones are no error."""
    if not path.is_dir():
        before("remove", path)
        path.unlink(missing_ok=True)
        return
    gone = temporary_name(path)
    shutil.rmtree(gone, ignore_errors=True)
    rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_empty(folder: Path) -> None:
    """Remove a folder with nothing in it. Raises OSError for any other."""
    before("remove", folder)
    folder.rmdir()


def sync(path: Path) -> None:
    """Flush a file or a folder entry to disk."""
    with naming(path):
        before("sync", path)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)


def sweep_up(folder: Path) -> None:
    """Remove what processes of this host that are dead left half-written; a folder that one had moved goes back."""
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            _settle_dead(Path(parent), name)


def _clear(path: Path) -> None:
    """Do the same for what dead processes left of one file or folder, wherever it lies."""
    for left in path.parent.glob(glob.escape(f".{path.name}.") + "*"):
        _settle_dead(path.parent, left.name)


def _settle_dead(folder: Path, name: str) -> None:
    found = TEMPORARY.fullmatch(name)
    if found and found["host"] == socket.gethostname() and _dead(int(found["pid"]), folder / name):
        with suppress(OSError):  # it costs space only
            _settle(folder, found)


def _settle(folder: Path, found: "re.Match[str]") -> None:
    left, place = folder / found[0], folder / found["name"]
    if found["kind"] == "old" and not place.exists():
        os.replace(left, place)
    elif left.is_dir():
        shutil.rmtree(left)
    else:
        left.unlink()


def _dead(pid: int, left: Path) -> bool:
    """Tell whether the process that left something is gone; one that began later only has its number."""
    try:
        return psutil.Process(pid).create_time() > left.lstat().st_ctime + CLOCK_S
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError, OverflowError):
        return False
