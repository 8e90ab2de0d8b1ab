"""Where prompts come from. An entry of ``SOURCES`` is all that a kind of source needs to be named in a preset.

A row has a column ``messages`` (a list of role and content) or ``prompt`` (text), unless a preset names others.
"""

import errno
import glob
import hashlib
import json
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from kdctl.base.errors import DataError
from kdctl.data.text_files import check_text_file, why_not_json
from kdctl.run.hashes import known_files, known_sha256
from kdctl.system.packages import PREFIX, inside_package
from kdctl.system.patches import archives_packed, hub_offline

Row = dict[str, Any]
FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".arrow": ("arrow", {}),
}
"""What datasets calls the format of files by their endings, and what it is told of it."""
BINARY = ("parquet", "arrow")
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of single compressed files."""

MEANT = {
    "corresponds to no data": "it has no rows",
    "BatchSize must be greater than 0": "it has no rows",
    "OfflineModeIsEnabled": "it is not in the cache, and the Hub may not be asked, because runtime.offline or "
    "HF_HUB_OFFLINE says so; run once without, or name a file",
    "LocalEntryNotFoundError": "it is not in the cache, and the Hub cannot be reached; check the network, or name "
    "a file",
    "Not enough disk space": "the disk of its cache is full; free some space, or set HF_HOME to another place",
    "EOF inside string": "a quote is not closed, so that the rest of the file is one field; close it, or double a "
    "quote that is text",
    "zstd not supported": "it needs the package zstandard, which is not installed; pip install zstandard, or unpack it",
}
"""What datasets says, and what it means."""


class PromptSource(Protocol):
    """One source, and the split that is asked for of it."""

    name: str

    def __init__(self, name: str, split: str, offline: bool):
        """Take what the preset says, reading nothing. offline: the Hub may not be asked."""
        ...

    @staticmethod
    def takes(name: str) -> bool:
        """Tell whether a name in a preset is of this kind."""
        ...

    def fingerprint(self) -> str:
        """Return what differs wherever ``rows`` do: a revision, or the hash of a file."""
        ...

    def rows(self) -> Sequence[Row]:
        """Read the rows. Raises DataError if they cannot be read."""
        ...


class Bundled:
    """The prompts that come with kdctl."""

    def __init__(self, name: str, split: str, offline: bool):
        self.name, self.split = name, split
        self.file = files("kdctl").joinpath("data/prompts.jsonl")

    @staticmethod
    def takes(name: str) -> bool:
        """Tell whether they are meant."""
        return name == "kdctl"

    def fingerprint(self) -> str:
        """Hash the file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def rows(self) -> Sequence[Row]:
        """Read one split."""
        rows = list(map(json.loads, self.file.read_text(encoding="utf-8").splitlines()))
        if self.split not in (splits := {row["split"] for row in rows}):
            raise DataError(f"kdctl's own prompts have no split {self.split!r}; there are {', '.join(sorted(splits))}")
        return [row for row in rows if row["split"] == self.split]


class LocalFile:
    """A file of one of ``FORMATS``, maybe compressed; it is one split, whatever that is called."""

    def __init__(self, name: str, split: str, offline: bool):
        self.name, self.split, self.path = name, split, Path(name).expanduser()

    @staticmethod
    def takes(name: str) -> bool:
        """Tell whether a name is of a file that is there, or looks like one."""
        return "://" in name or _format(name) is not None or _is_file(Path(name).expanduser())

    def fingerprint(self) -> str:
        """Hash the file, unless that was done before and nothing has changed it."""
        self._check()
        return known_sha256(self.path)

    def rows(self) -> Sequence[Row]:
        """Read the file through a memory map of what datasets makes of it."""
        self._check()
        import datasets  # 0.1 GiB that kdctl's own prompts do not need

        kind, options = _format(self.name) or ("", {})
        path: Any = glob.escape(str(self.path))  # because datasets takes a path for a pattern
        if kind not in BINARY:
            self._check_text(kind)  # first, because datasets takes any bytes and fails at the row, or crashes
        with _named_errors(self.name, self.split, self.path if kind == "json" else None):
            return datasets.load_dataset(kind, data_files=path, split="train", **options)  # pyright: ignore

    def _check_text(self, kind: str) -> None:
        """Check the whole text, unless that was done before and nothing has changed the file."""

        def checked(path: Path) -> str:
            check_text_file(path, kind)
            return kind

        checked.__name__ = f"checked as {kind}"
        known_files(self.path.parent, [self.path.name], checked)

    def _check(self) -> None:
        if not _is_file(self.path):
            raise DataError(_why_no_file(self.name, self.path))
        if _format(self.name) is None:
            raise DataError(
                f"the prompt file {self.path.absolute()} is of no kind that is read: {', '.join(FORMATS)}, also with "
                f"{', '.join(PACKED)} behind it; convert it, or give it the ending of what it is"
            )
        if self.path.stat().st_size == 0:
            raise DataError(f"the prompt file {self.path.absolute()} is empty; there is nothing to generate from")
        if _is_archive(self.path):
            raise DataError(
                f"the prompt file {self.path.absolute()} is an archive, and kdctl unpacks none; unpack it and name the "
                "file in it"
            )


class PackageFile(LocalFile):
    """A file inside an installed package."""

    def __init__(self, name: str, split: str, offline: bool):
        super().__init__(name, split, offline)
        self.path = inside_package(name, DataError)

    @staticmethod
    def takes(name: str) -> bool:
        """Tell whether a name is of a file in a package."""
        return name.startswith(PREFIX)


def _format(name: str) -> tuple[str, dict[str, str]] | None:
    """Return the format that a file's name says, None if it says none."""
    path = Path(name.lower())
    return FORMATS.get(Path(path.stem).suffix if path.suffix in PACKED else path.suffix)


def _is_file(path: Path) -> bool:
    """Tell whether there is such a file; no name is too long to ask."""
    try:
        return path.is_file()
    except OSError:
        return False


def _is_archive(path: Path) -> bool:
    """Tell whether a file holds files; one that is damaged does not."""
    try:
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return False


def _why_no_file(name: str, path: Path) -> str:
    """Say what a name is that looks like one of a prompt file."""
    if "://" in name:
        return f"{name!r:.300} is an address, and prompts are read from files here and from the Hub; download the file"
    place, kind = str(path.absolute())[:500], _kind(path)
    if kind is None and re.search(r"[*?\[]", name):
        return f"no prompt file at {place}; patterns are not looked up: name one file, or the folder that has them"
    return f"no prompt file at {place}" if kind is None else f"{place} is no prompt file but {kind}; name a file"


def _kind(path: Path) -> str | None:
    """Say what there is that is no file, None if nothing is."""
    try:
        if path.is_symlink() and not path.exists():
            return "a link that leads nowhere"
        mode = path.stat().st_mode
    except OSError as error:
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
        return None if gone else f"unreadable ({error.strerror})"
    except RuntimeError:
        return "a link to itself"
    return "a folder" if stat.S_ISDIR(mode) else "a pipe or a device, and prompts are read more than once"


class HubDataset:
    """A data set on the Hugging Face Hub, or in its cache."""

    def __init__(self, name: str, split: str, offline: bool):
        self.name, self.split, self.offline = name, split, offline

    @staticmethod
    def takes(name: str) -> bool:
        """Take every name that no other kind does."""
        return True

    def fingerprint(self) -> str:
        """Return the one that datasets gives: of the revision, the configuration and the split."""
        return str(self._loaded._fingerprint)

    def rows(self) -> Sequence[Row]:
        """Read the split, downloading it once."""
        return self._loaded

    @cached_property
    def _loaded(self) -> Any:
        import datasets

        with _named_errors(self.name, self.split), hub_offline(self.offline):
            return datasets.load_dataset(_folder(self.name), split=self.split)


def _folder(name: str) -> str:
    """Return a name of a data set; one of a folder that ends in dots is written out, because datasets goes by it."""
    return str(Path(name).resolve()) if Path(name).name in ("", "..") else name


SOURCES: dict[str, type[PromptSource]] = {
    "hub": HubDataset,
    "file": LocalFile,
    "package": PackageFile,
    "kdctl": Bundled,
}
"""Kinds of sources; the last one that takes a name has it."""


@lru_cache(maxsize=8)
def open_source(name: str, split: str, offline: bool = False) -> PromptSource:
    """Return the source that a preset names, the same one again where it is named again."""
    kind = next(kind for kind in reversed(SOURCES.values()) if kind.takes(name))
    return kind(name, split, offline)


def read_rows(name: str, split: str, offline: bool = False, columns: Collection[str] = ()) -> Sequence[Row]:
    """Read a source's rows. Raises DataError if it cannot be read, is empty or holds no prompts.

    columns: those that must be there, in place of ``messages`` or ``prompt``.
    """
    if not name:
        raise DataError("the name of the prompts is empty; kdctl names the bundled ones")
    rows = open_source(name, split, offline).rows()
    if len(rows) == 0:
        raise DataError(f"prompts from {name!r} (split {split!r}): no rows; there is nothing to generate from")
    there = set(row_of(rows, 0, name))
    if missing := sorted({*columns} - there):
        raise DataError(
            f"prompts from {name!r}: has no column {missing[0]!r}, which the preset names, but {sorted(there)}"
        )
    if not columns and not there & {"messages", "prompt"}:
        raise DataError(f"prompts from {name!r}: needs a column 'messages' or 'prompt', has {sorted(there)}")
    return rows


def row_of(rows: Sequence[Row], index: int, name: str = "") -> Row:
    """Return a row. Raises DataError for one that is not text where it should be."""
    try:
        return rows[index]
    except UnicodeDecodeError as error:
        where = f" of {name!r}" if name else ""
        raise DataError(f"row {index + 1}{where} is not UTF-8 text: {error}; save the data set as UTF-8") from None


@contextmanager
def _named_errors(name: str, split: str, lines: Path | None = None) -> Iterator[None]:
    """Turn what datasets raises into one line that names the data set, and keep it from unpacking archives.

    lines: a file of JSON, whose broken line is looked for.
    """
    try:
        with archives_packed():
            yield
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever reads a format raises its own kinds, StopIteration among them
        cause = error.__cause__ or error
        place = Path(str(getattr(cause, "filename", None) or name)).absolute()
        if isinstance(cause, OSError) and not place.is_relative_to(Path(name).expanduser().absolute()):
            raise DataError(
                f"data set {name!r:.300} cannot be kept for reading in {place}: {cause.strerror}; HF_HOME or "
                "HF_DATASETS_CACHE says where, and must be a folder to write in"
            ) from None
        if lines and isinstance(cause, ValueError) and (found := why_not_json(lines)):
            raise DataError(found) from None
        reason = (str(cause).strip() or f"it is damaged or empty ({type(cause).__name__})").splitlines()[0]
        raise DataError(f"data set {name!r:.300} (split {split!r}) cannot be read: {_in_words(reason):.600}") from None


def _in_words(reason: str) -> str:
    """Return what datasets says, or what it means where it does not say that."""
    return next((words for text, words in MEANT.items() if text in reason), "{}").format(reason)
