"""The run folder: names of every file in it, atomic writes, and the preset that it belongs to."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from kdctl.base.errors import StoreError

RecordT = TypeVar("RecordT", bound=BaseModel)


class RunDir:
    """Names every file of a run; creates nothing by itself."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.preset = self.path / "preset.json"
        self.student = self.path / "student"
        self.distill_root = self.path / "distill"
        self.eval_root = self.path / "eval"
        self.report = self.path / "report"
        self.sweeps = self.path / "sweeps"
        self.heldout = self.path / "rollouts" / "heldout"

    def rollouts(self, source: str) -> Path:
        """Return the folder of an offline rollout store."""
        return self.path / "rollouts" / source

    def compared(self, method: str) -> Path:
        """Return the file of what one post-training method reaches."""
        return self.path / "compare" / f"{method}.json"

    def variant(self, name: str) -> "VariantDir":
        """Return the folder of one distilled variant."""
        return VariantDir(self.distill_root / name)

    def variants(self) -> list["VariantDir"]:
        """List the finished variants, by name."""
        found = sorted(self.distill_root.glob("*/distill.json"))
        return [VariantDir(path.parent) for path in found]

    def eval(self, model: str) -> Path:
        """Return the folder of one model's evaluation."""
        return self.eval_root / model

    def prepare(self) -> None:
        """Create the run folder. Raises StoreError if it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise StoreError(
                f"cannot write to the run folder {self.path}: {error.strerror}; choose another with --run"
            ) from None


class VariantDir:
    """Names every file of a distilled variant."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.name
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.report = path / "distill.json"


def enclosing_run(folder: Path) -> RunDir | None:
    """Return the run folder that a student folder lies in, ``student/`` or ``distill/<variant>/final/``, if any."""
    for parent in list(folder.resolve().parents)[:3]:
        if (parent / "preset.json").is_file():
            return RunDir(parent)
    return None


def cache_dir() -> Path:
    """Return the folder of what any run can make again: ``$KDCTL_CACHE``, else ``~/.cache/kdctl``."""
    return Path(os.environ.get("KDCTL_CACHE", "~/.cache/kdctl")).expanduser()


def sha256(path: Path) -> str:
    """Hash a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old content or the new, never half of it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record as indented JSON, atomically."""
    write_text(path, record.model_dump_json(indent=2) + "\n")


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Read a record. Raises StoreError if the file is missing or does not fit the record."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; the stage that writes it has not finished") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged or of another kdctl version: {error}") from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that becomes ``path`` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Move a finished folder to its place, removing what was there."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or a folder entry to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def disk_of(folder: Path) -> tuple[Path, int]:
    """Return the nearest folder that exists, and the free bytes of the disk that it lies on."""
    while not folder.exists():
        folder = folder.parent
    return folder, shutil.disk_usage(folder).free


def require_free_space(folder: Path, needed_bytes: int, what: str, option: str = "--run") -> None:
    """Raise StoreError, before any work, if ``folder``'s disk has not ``needed_bytes`` left."""
    folder, free = disk_of(folder)
    if free < needed_bytes:
        raise StoreError(
            f"{what} needs {needed_bytes / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB free; "
            f"free some space or choose another place with {option}"
        )
