"""Hashes of large files, remembered: no model or store is read twice for them while its files do not change."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

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


NoteT = TypeVar("NoteT", bound=Record)
SHA256 = "sha256"
FILES_NOTE = "kdctl.json"
SETTLED_S = 2.0
"""A file that changed less than this ago may change again without a later time stamp, so nothing is kept of it."""
Stamp = tuple[int, ...]
Measure = Callable[[Path], str]
_KNOWN: dict[tuple[str, Stamp], str] = {}
"""What this process has read or written itself, by measure, file and time stamp: a file keeps them when its folder is
renamed."""


def known_sha256(path: Path, proven: bool = False) -> str:
    """Hash a file, or return what was found when it had the same size and time stamps.

    proven: count only what this process has read itself, where the bytes on the disk are in question.
    """
    stamp = stamp_of(path)
    if (found := _KNOWN.get((SHA256, stamp))) is not None:
        return found
    kept = _kept(path)
    note = None if proven else _read(kept, Note)
    if note is not None and note.stamp == stamp:
        return note.sha256
    found = _measured(path, stamp, SHA256, sha256)
    if (SHA256, stamp) in _KNOWN:
        _write(kept, Note(stamp=stamp, sha256=found))
    return found


def written_sha256(path: Path) -> str:
    """Hash a file that this process has just written where no other looks, and remember it wherever it is moved."""
    remember(path, found := sha256(path))
    return found


def remember(path: Path, found: str) -> None:
    """Take the hash of a file from whoever wrote it in this process."""
    _KNOWN[SHA256, stamp_of(path)] = found


class FolderNote(Record):
    """What was found of the files of a folder."""

    files: dict[str, Note]


def known_files(folder: Path, names: Sequence[str], measure: Measure | None = None) -> list[str]:
    """Hash many files of a folder like ``known_sha256``, with one note for all.

    measure: what is remembered of a file in place of its sha256; its name tells it from others.
    """
    kind = measure.__name__ if measure else SHA256
    stamps = {name: stamp_of(f"{folder}/{name}") for name in names}
    found = {name: _KNOWN[kind, stamp] for name, stamp in stamps.items() if (kind, stamp) in _KNOWN}
    if len(found) < len(stamps):
        noted = _noted(folder, kind)
        same = {
            name: noted[name].sha256 for name in stamps.keys() - found.keys() if _is_of(noted.get(name), stamps[name])
        }
        unread = [name for name in stamps if name not in found and name not in same]
        found |= same | {name: _measured(folder / name, stamps[name], kind, measure or sha256) for name in unread}
        if unread:
            _note(folder, kind, noted, stamps)
    return [found[name] for name in names]


def note_known(folder: Path, names: Iterable[str]) -> None:
    """Note for other processes the hashes of a folder's files that this one has read or written, and no other's."""
    _note(folder, SHA256, {}, {name: stamp_of(folder / name) for name in names})


def _note(folder: Path, kind: str, noted: Mapping[str, Note], stamps: Mapping[str, Stamp]) -> None:
    """Add to what is noted of a folder what is known of files of these stamps, unless they have just changed."""
    settled = {name: stamp for name, stamp in stamps.items() if (kind, stamp) in _KNOWN and _is_settled(stamp)}
    new = {name: Note(stamp=stamp, sha256=_KNOWN[kind, stamp]) for name, stamp in settled.items()}
    _write(_kept(folder, kind), FolderNote(files={**noted, **new}))


def _noted(folder: Path, kind: str) -> Mapping[str, Note]:
    """Return what is noted of a folder; nothing where a note is missing or damaged."""
    note = _read(_kept(folder, kind), FolderNote)
    return note.files if note else {}


def _is_of(note: Note | None, stamp: Stamp) -> bool:
    return note is not None and note.stamp == stamp


def _measured(path: Path, stamp: Stamp, kind: str, measure: Measure) -> str:
    """Read a file, and remember what is found of it unless it has just changed."""
    found = measure(path)
    if stamp_of(path) == stamp and _is_settled(stamp):
        _KNOWN[kind, stamp] = found
    return found


def _is_settled(stamp: Stamp) -> bool:
    return time.time() - stamp[1] / 1e9 >= SETTLED_S


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


def stamp_of(path: Path | str) -> Stamp:
    """Return which file it is and what changes with its content; the time of any change no program can set back."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns, status.st_dev


def _kept(path: Path, kind: str = "") -> Path:
    """Return where what is found of a file, or of all those of a folder, is noted."""
    name = hashlib.sha256(f"{path.resolve()}{kind and chr(0)}{kind}".encode()).hexdigest()
    return cache_dir() / "hashes" / f"{name[:32]}.json"


def _read(kept: Path, kind: type[NoteT]) -> NoteT | None:
    """Return a note; None for a missing or damaged one."""
    try:
        return read_record(kept, kind)
    except (OSError, StoreError):
        return None


def _write(kept: Path, note: Record) -> None:
    """Keep a note. Where the cache cannot be written files are read again next time, which costs time only."""
    try:
        write_record(kept, note)
    except OSError:
        return
