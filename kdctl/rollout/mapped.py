"""The rollouts of a store as a sequence that decodes a row when it is asked for.

Parquet cannot be read by the row, so a shard is unpacked once, when one of its rows is first asked for, into a nameless
file that is read through memory maps. However many rollouts there are, the process holds a few of them; the file takes
4 bytes a token on the disk of the cache folder and is gone when the sequence is.
"""

import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, overload

import pyarrow as pa
import pyarrow.parquet as pq

from kdctl.base.errors import StoreError
from kdctl.run.files import nameless, writing
from kdctl.run.paths import cache_dir
from kdctl.run.records import Rollout

Place = tuple[int, int]
"""Start and length in bytes."""
UNPACKED = 4096
"""Rows that are unpacked at once."""
MAPPED = 1024
"""Shards that are mapped at once; a system allows some ten thousand maps."""


class MappedTables:
    """Arrow tables in a nameless file of the cache folder, each read through a memory map of its own."""

    def __init__(self) -> None:
        try:
            self._file = nameless(cache_dir())
        except OSError as error:
            raise _no_room(error) from None
        self.table = lru_cache(maxsize=MAPPED)(partial(_mapped, self._file))

    def add(self, shard: pq.ParquetFile) -> Place:
        """Unpack a shard, some rows at a time, and return where it lies. Raises StoreError if the disk is full."""
        start = -(-self._file.seek(0, os.SEEK_END) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            self._file.seek(start)
            with pa.ipc.new_stream(self._file, shard.schema_arrow) as writer:
                for batch in shard.iter_batches(batch_size=UNPACKED):
                    with writing(cache_dir()):
                        writer.write_batch(batch)
            self._file.flush()
        except OSError as error:
            raise _no_room(error) from None
        return start, self._file.tell() - start


def _no_room(error: OSError) -> StoreError:
    return StoreError(
        f"rollouts cannot be unpacked in {cache_dir()}: {error.strerror or error}; free some space there, or name "
        "another folder in KDCTL_CACHE"
    )


def _mapped(file: BinaryIO, place: Place) -> pa.Table:
    start, length = place
    view = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start)
    return pa.ipc.open_stream(pa.py_buffer(view)).read_all()


class Shards:
    """Parquet shards that are known to be whole; rows are counted through all of them.

    counts: rows of each. refuse: makes the error for a shard that has been changed since.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], refuse: Callable[[Path], StoreError]):
        self.paths, self.counts, self.refuse = paths, counts, refuse
        self.ends = list(accumulate(counts))
        self.found = [_state(path) for path in paths]
        self.unpacked: dict[int, Place] = {}

    @cached_property
    def tables(self) -> MappedTables:
        """Shards that were unpacked."""
        return MappedTables()

    def row(self, number: int) -> Rollout:
        """Decode one row."""
        shard = bisect_right(self.ends, number)
        if shard not in self.unpacked:
            self.unpacked[shard] = self._unpack(shard)
        table = self.tables.table(self.unpacked[shard])
        place = number - self.ends[shard] + len(table)
        return Rollout(**{name: _value(table.column(name)[place]) for name in table.column_names})

    def _unpack(self, shard: int) -> Place:
        path, tables = self.paths[shard], self.tables
        try:
            if _state(path) != self.found[shard]:
                raise self.refuse(path)
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                if file.metadata.num_rows != self.counts[shard]:
                    raise self.refuse(path)
                return tables.add(file)
        except (OSError, pa.ArrowException):
            raise self.refuse(path) from None


@dataclass(frozen=True, eq=False)
class MappedRollouts(Sequence[Rollout]):
    """Some rows of shards, in order; a slice decodes nothing and is one of these again."""

    shards: Shards
    rows: range

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Rollout: ...

    @overload
    def __getitem__(self, index: slice) -> "MappedRollouts": ...

    def __getitem__(self, index: int | slice) -> "Rollout | MappedRollouts":
        """Decode a row, or select rows."""
        if isinstance(index, slice):
            return MappedRollouts(self.shards, self.rows[index])
        return self.shards.row(self.rows[index])


def _state(path: Path) -> tuple[int, int]:
    """Return what changes when a file is written: its size and time."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _value(scalar: Any) -> Any:
    """Return a scalar as Python has it; lists by way of numpy, which is ten times as fast on long ones."""
    if isinstance(scalar, pa.ListScalar) and scalar.is_valid:
        return scalar.values.to_numpy().tolist()
    return scalar.as_py()
