"""Hashes of large files, remembered: no model is read twice for its fingerprint while its files do not change."""

import hashlib
import time
from pathlib import Path

from kdctl.base.errors import StoreError
from kdctl.run.files import sha256
from kdctl.run.names import inside
from kdctl.run.paths import cache_dir
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import Record


class Note(Record):
    """What was found when a file had this stamp."""

    stamp: tuple[int, ...]
    sha256: str


FILES_NOTE = "kdctl.json"
SETTLED_S = 2.0
"""A file that changed less than this ago may change again without a later time stamp, so nothing is kept of it."""
_KNOWN: dict[tuple[int, ...], str] = {}
"""What this process has read itself, by file and time stamp: a file keeps them when its folder is renamed."""


def known_sha256(path: Path, proven: bool = False) -> str:
    """Hash a file, or return what was found when it had the same size and time stamps.

    proven: count only what this process has read itself, where the bytes on the disk are in question.
    """
    name, stamp = str(path.resolve()), _stamp(path)
    if stamp in _KNOWN:
        return _KNOWN[stamp]
    kept = cache_dir() / "hashes" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    found = None if proven else _read(kept, stamp)
    if found is None:
        found = sha256(path)
        if _stamp(path) != stamp or time.time() - stamp[1] / 1e9 < SETTLED_S:
            return found
        _write(kept, stamp, found)
        _KNOWN[stamp] = found
    return found


def written_sha256(path: Path) -> str:
    """Hash a file that this process has just written where no other looks, and remember it wherever it is moved."""
    _KNOWN[_stamp(path)] = found = sha256(path)
    return found


class FilesNote(Record):
    """The sha256 of every file of a folder of the cache, by name."""

    files: dict[str, str]


def note_files(folder: Path) -> None:
    """Write beside the files of a folder of the cache what they are."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): written_sha256(path) for path in found}
    write_record(folder / FILES_NOTE, FilesNote(files=files))


def is_whole(folder: Path) -> bool:
    """Tell whether a folder of the cache is there and holds what was written."""
    try:
        files = read_record(folder / FILES_NOTE, FilesNote).files
        return all(known_sha256(inside(folder, name)) == found for name, found in files.items())
    except (OSError, StoreError):
        return False


def _stamp(path: Path) -> tuple[int, ...]:
    """Return which file it is and what changes with its content; the time of any change no program can set back."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns, status.st_dev


def _read(kept: Path, stamp: tuple[int, ...]) -> str | None:
    """Return the hash that is kept for a file of this stamp; None for another one, or a damaged note."""
    try:
        note = read_record(kept, Note)
    except (OSError, StoreError):
        return None
    return note.sha256 if note.stamp == stamp else None


def _write(kept: Path, stamp: tuple[int, ...], found: str) -> None:
    """Keep a hash. Where the cache cannot be written the file is read again next time, which costs time only."""
    try:
        write_record(kept, Note(stamp=stamp, sha256=found))
    except OSError:
        return
