"""Arrow streams in files: written a record batch at a time, and mapped to be read.

Behind a stream stands the sha256 of all that is before, which says whether the file is whole; readers of Arrow streams,
those of datasets among them, stop before it. Nothing is compressed, so that a mapped file is a table, and processes
that read one file share its pages.
"""

import ctypes
import hashlib
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from kdctl.run.files import atomic_file, before

LIBC = ctypes.CDLL(None)
HASH = 32
"""Bytes of a SHA-256."""


def write_stream(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> str:
    """Write a file atomically, the same bytes for batches that were built alike, and return its sha256, hexadecimal.

    Slices of arrays carry bytes of their neighbours into a file: a batch is built for itself.
    """
    with atomic_file(path) as file:
        sink = _Hashing(file)
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        sink.write(sink.sum.digest())
    return sink.sum.hexdigest()


def mapped_stream(path: Path) -> tuple[pa.Table, pa.Buffer]:
    """Return a file as a table that lies in it, and all of its bytes, which lie there too.

    Raises OSError or ArrowException where it cannot be read.
    """
    mapped = _mapped(path)
    return pa.ipc.open_stream(mapped).read_all(), mapped


def value_of(scalar: Any) -> Any:
    """Return a scalar of a table as Python has it; lists by way of numpy, which is ten times as fast on long ones."""
    if isinstance(scalar, pa.ListScalar) and scalar.is_valid:
        return scalar.values.to_numpy().tolist()
    return scalar.as_py()


def let_go(mapped: pa.Buffer) -> None:
    """Take the pages of a mapped file out of this process's memory; they stay in the system's, and come when read."""
    LIBC.madvise(ctypes.c_void_p(mapped.address), ctypes.c_size_t(mapped.size), mmap.MADV_DONTNEED)


def whole_sha256(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal; nothing where it cannot be read or is not what was written."""
    try:
        data = memoryview(_mapped(path)).cast("B")
    except (OSError, pa.ArrowException):
        return ""
    found = hashlib.sha256(data[:-HASH])
    if found.digest() != data[-HASH:]:
        return ""
    found.update(data[-HASH:])
    return found.hexdigest()


def _mapped(path: Path) -> pa.Buffer:
    before("read", path)
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


class _Hashing:
    """A file that is hashed as it is written."""

    closed = False

    def __init__(self, file: BinaryIO):
        self.file, self.sum = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and hash."""
        self.sum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Leave it to the file's end."""
