"""One shard of a rollout store: an Arrow stream of rows that is mapped to be read.

Older shards are Parquet, which cannot be read by the row; they are decoded whole.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdctl.run.files import sha256
from kdctl.run.hashes import remember
from kdctl.run.records import Rollout, ShardEntry
from kdctl.run.streams import mapped_stream, whole_sha256, write_stream

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


def record_batches(rollouts: Sequence[Rollout]) -> Iterable[pa.RecordBatch]:
    """Make the record batches of rollouts, one at a time, each built for itself."""
    for first in range(0, len(rollouts), TOGETHER):
        yield pa.RecordBatch.from_pylist([vars(one) for one in rollouts[first : first + TOGETHER]], schema=SCHEMA)


def rollouts_of(table: pa.Table) -> list[Rollout]:
    """Decode all rows of a shard."""
    return [Rollout(**row) for row in table.to_pylist()]


def write(path: Path, batches: Iterable[pa.RecordBatch], identity: str) -> ShardEntry:
    """Write a shard atomically, a batch at a time, the same bytes for the same rows, and describe it."""
    counted = _Counted()
    found = write_stream(path, _schema(identity), counted.all(batches))
    remember(path, found)
    return counted.entry(path, found)


def read_whole(path: Path, identity: str) -> tuple[pa.Table, ShardEntry] | None:
    """Read and describe a shard of this identity; None where there is none, or it is not what was written."""
    try:
        found = sha256(path) if path.suffix == OLDER else whole_sha256(path)
        if not found:
            return None
        table, _ = mapped(path)
    except (OSError, pa.ArrowException):
        return None
    if not table.schema.equals(_schema(identity), check_metadata=True):
        return None
    counted = _Counted()
    for _ in counted.all(table.to_batches()):
        pass
    return table, counted.entry(path, found)


def mapped(path: Path) -> tuple[pa.Table, pa.Buffer | None]:
    """Return a shard as a table in its file, and the bytes of that; an older one in memory.

    Raises OSError or ArrowException where it cannot be read.
    """
    if path.suffix == OLDER:
        return pq.read_table(path, page_checksum_verification=True), None
    return mapped_stream(path)


def _schema(identity: str) -> pa.Schema:
    return SCHEMA.with_metadata({IDENTITY: identity.encode()})


class _Counted:
    """Counts rows and tokens of a shard as they come."""

    def __init__(self) -> None:
        self.rows, self.tokens, self.step = 0, 0, 0

    def all(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Count batches on their way."""
        for batch in batches:
            self.step = self.step if self.rows else batch.column("policy_step")[0].as_py()
            self.rows += len(batch)
            self.tokens += pc.sum(pc.list_value_length(batch.column("completion_ids"))).as_py()  # pyright: ignore
            yield batch

    def entry(self, path: Path, found: str) -> ShardEntry:
        """Describe the shard."""
        return ShardEntry(
            file=path.name, rows=self.rows, completion_tokens=self.tokens, sha256=found, policy_step=self.step
        )
