"""One shard of a rollout store: an Arrow IPC stream of rows, and behind it the sha256 of all that is before.

The stream is not compressed, so that a file that is mapped is a table: nothing is unpacked, and processes that read one
shard share its pages. Readers of Arrow streams, those of datasets among them, stop before the hash. Older shards are
Parquet, which cannot be read by the row; they are decoded whole.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdctl.run.files import atomic_file, read_bytes
from kdctl.run.hashes import remember
from kdctl.run.records import Rollout, ShardEntry

# Parquet's own name for list items, so that the schema of older shards is the same.
INTEGERS = pa.list_(pa.field("element", pa.int32()))
NUMBERS = pa.list_(pa.field("element", pa.float32()))
SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_index", pa.int32(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_ids", INTEGERS, nullable=False),
        pa.field("completion_ids", INTEGERS, nullable=False),
        pa.field("logprobs", NUMBERS),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("policy_step", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
IDENTITY = b"kdctl.identity"
NAME = re.compile(r"shard-\d{5,}\.(arrow|parquet)")
SUFFIX, OLDER = ".arrow", ".parquet"
TOGETHER = 1024
"""Rows of a record batch; what is read of a row lies near what is read of its neighbours."""
HASH = 32
"""Bytes of a SHA-256."""


def record_batches(rollouts: Sequence[Rollout]) -> Iterable[pa.RecordBatch]:
    """Make the record batches of rollouts, one at a time.

    Each is built anew: slices of arrays carry bytes of their neighbours into a file.
    """
    for first in range(0, len(rollouts), TOGETHER):
        yield pa.RecordBatch.from_pylist([vars(one) for one in rollouts[first : first + TOGETHER]], schema=SCHEMA)


def rollouts_of(table: pa.Table) -> list[Rollout]:
    """Decode all rows of a shard."""
    return [Rollout(**row) for row in table.to_pylist()]


def write(path: Path, batches: Iterable[pa.RecordBatch], identity: str) -> ShardEntry:
    """Write a shard atomically, a batch at a time, the same bytes for the same batches, and describe it."""
    schema = SCHEMA.with_metadata({IDENTITY: identity.encode()})
    counted = _Counted()
    with atomic_file(path) as file:
        sink = _Hashing(file)
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
                counted.add(batch)
        sink.write(sink.sum.digest())
    remember(path, found := sink.sum.hexdigest())
    return counted.entry(path, found)


def read_whole(path: Path, identity: str) -> tuple[pa.Table, ShardEntry] | None:
    """Read and describe a shard of this identity; None where there is none, or it is not what was written."""
    try:
        data = memoryview(read_bytes(path))
        if path.suffix == OLDER:
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        elif hashlib.sha256(data[:-HASH]).digest() == data[-HASH:]:
            table = pa.ipc.open_stream(data).read_all()
        else:
            return None
    except (OSError, pa.ArrowException):
        return None
    if not table.schema.equals(SCHEMA.with_metadata({IDENTITY: identity.encode()}), check_metadata=True):
        return None
    counted = _Counted()
    for batch in table.to_batches():
        counted.add(batch)
    return table, counted.entry(path, hashlib.sha256(data).hexdigest())


def mapped(path: Path) -> pa.Table:
    """Return a shard as a table in its file. Raises OSError or ArrowException where it cannot be read."""
    if path.suffix == OLDER:
        return pq.read_table(path, page_checksum_verification=True)
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


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


class _Counted:
    """Counts rows and tokens of a shard as they come."""

    def __init__(self) -> None:
        self.rows, self.tokens, self.step = 0, 0, 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Count a batch."""
        self.step = self.step if self.rows else batch.column("policy_step")[0].as_py()
        self.rows += len(batch)
        self.tokens += pc.sum(pc.list_value_length(batch.column("completion_ids"))).as_py()  # pyright: ignore

    def entry(self, path: Path, found: str) -> ShardEntry:
        """Describe the shard."""
        return ShardEntry(
            file=path.name, rows=self.rows, completion_tokens=self.tokens, sha256=found, policy_step=self.step
        )
