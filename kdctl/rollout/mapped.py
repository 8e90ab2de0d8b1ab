"""The rollouts of a store as a sequence that decodes a row when it is asked for.

A shard is mapped when one of its rows is first asked for. However many rollouts there are, the process holds a few of
them; what it reads are pages of the system's cache of files, one copy for all processes.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdctl.base.errors import StoreError
from kdctl.rollout.shard import mapped
from kdctl.run.files import sha256
from kdctl.run.hashes import stamp_of
from kdctl.run.records import Rollout
from kdctl.run.streams import let_go, value_of

MAPPED = 1024
"""Shards that are mapped at once; a system allows some ten thousand maps."""
LET_GO = 512
"""Looks into shards after which all pages are let go of; one look maps a megabyte or so of a file."""


class Shards:
    """Shards that are known to be whole; rows are counted through all of them.

    counts: rows of each; sums: their sha256. refuse: makes the error for a shard that has been changed since.
    """

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], sums: Sequence[str], refuse: Callable[[Path], StoreError]
    ):
        self.paths, self.counts, self.sums, self.refuse = paths, counts, sums, refuse
        self.ends = list(accumulate(counts))
        self.found = [stamp_of(path) for path in paths]
        self._tables: dict[int, tuple[pa.Table, pa.Buffer | None]] = {}
        self._looks = 0

    def row(self, number: int) -> Rollout:
        """Decode one row."""
        shard = bisect_right(self.ends, number)
        table = self.table(shard)
        place = number - self.ends[shard] + len(table)
        return Rollout(**{name: value_of(table.column(name)[place]) for name in table.column_names})

    def table(self, shard: int) -> pa.Table:
        """Return a shard as a table in its file. Raises StoreError if it has been changed since it was checked."""
        if shard not in self._tables:
            found = self._mapped(self.paths[shard], shard)
            if len(self._tables) >= MAPPED:
                self._tables.clear()
            self._tables[shard] = found
        self._looks += 1
        if self._looks % LET_GO == 0:
            for _, pages in self._tables.values():
                if pages is not None:
                    let_go(pages)
        return self._tables[shard][0]

    def _mapped(self, path: Path, shard: int) -> tuple[pa.Table, pa.Buffer | None]:
        try:
            if self._same(path, shard):
                table, pages = mapped(path)
                if len(table) == self.counts[shard]:
                    return table, pages
        except (OSError, pa.ArrowException):
            pass
        raise self.refuse(path) from None

    def _same(self, path: Path, shard: int) -> bool:
        """Tell whether a file is the one that was checked; one that was only touched is hashed again."""
        stamp = stamp_of(path)
        if stamp != self.found[shard]:
            if sha256(path) != self.sums[shard]:
                return False
            self.found[shard] = stamp
        return True


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


def numbers(rollouts: Sequence[Rollout], name: str) -> np.ndarray:
    """Return an integer of every rollout, (rows,) int64; of stored ones no row is decoded."""
    if not isinstance(rollouts, MappedRollouts):
        return np.array([getattr(rollout, name) for rollout in rollouts], np.int64)
    shards = rollouts.shards
    found = [shards.table(shard).column(name).to_numpy().astype(np.int64) for shard in range(len(shards.paths))]
    return np.concatenate([np.empty(0, np.int64), *found])[np.asarray(rollouts.rows, np.int64)]


class Places:
    """Finds rows by what tells them apart, and where what is kept of their completions begins: 16 bytes a row.

    A row is found by its prompt's and its sample's index; its prompt's name and its source must be the same too.
    """

    def __init__(self, rollouts: MappedRollouts):
        self.shards = rollouts.shards
        parts = [_keys_and_starts(self.shards.table(shard)) for shard in range(len(self.shards.paths))]
        self.keys, self.starts = (np.concatenate(each) for each in zip(*parts, strict=True))
        self.order = None if (self.keys[1:] >= self.keys[:-1]).all() else np.argsort(self.keys)

    def find(self, rollout: Rollout) -> tuple[int, int] | None:
        """Return a row's shard and its first completion token that has a predecessor, counted in that shard."""
        key = (rollout.prompt_index << 32) + rollout.sample_index
        place = int(np.searchsorted(self.keys, key, sorter=self.order))
        if place == len(self.keys):
            return None
        row = place if self.order is None else int(self.order[place])
        if self.keys[row] != key:
            return None
        shard = bisect_right(self.shards.ends, row)
        table = self.shards.table(shard)
        place = row - self.shards.ends[shard] + len(table)
        found = [table.column(name)[place].as_py() for name in ("prompt_id", "source")]
        return (shard, int(self.starts[row])) if found == [rollout.prompt_id, rollout.source] else None


def _keys_and_starts(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Read two columns and the lengths of two lists, and no token. Returns int64, (rows,) each."""
    prompt, sample = (table.column(name).to_numpy().astype(np.int64) for name in ("prompt_index", "sample_index"))
    before, after = (pc.list_value_length(table.column(name)).to_numpy() for name in ("prompt_ids", "completion_ids"))  # pyright: ignore
    counts = after - (before == 0)
    return (prompt << 32) + sample, np.cumsum(counts, dtype=np.int64) - counts
