"""What was measured on each held-out document and each benchmark item: columns of ``samples/*.parquet``."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdctl.run.files import atomic_path, sha256
from kdctl.run.measures import TOKEN_MEASURES, Choices, ItemMeasure, RollingMeasure, TokenMeasure

Array = NDArray[np.float64]
SCORE, ROLLING = "score", "loglikelihood"
WEIGHT, TEACHERS = "weight", "teacher_loglikelihoods"
"""Of a task of which only some items were asked: how many each counts for, and what the teacher said of it."""


@dataclass(frozen=True)
class PerDocument:
    """Sums over the completion tokens of each document, (documents,) float64, in nats and counts.

    sums: by the measures' columns; those that were measured.
    """

    tokens: Array
    sums: Mapping[str, Array]

    def __getitem__(self, measure: TokenMeasure) -> Array:
        """Return the sums of a measure."""
        return self.sums[measure.column]

    def has(self, measure: TokenMeasure) -> bool:
        """Tell whether a measure was taken; folders made before it was declared lack it."""
        return measure.column in self.sums

    def mean(self, measure: TokenMeasure) -> float:
        """Return the mean of a measure per token."""
        return float(self[measure].sum() / self.tokens.sum())

    def value(self, measure: TokenMeasure) -> float:
        """Return a measure of the model: its mean per token, or exp of it."""
        return float(np.exp(self.mean(measure))) if measure.exponent else self.mean(measure)

    @property
    def complete(self) -> bool:
        """Tell whether every measure was taken."""
        return all(map(self.has, TOKEN_MEASURES.values()))


def from_table(table: pa.Table) -> PerDocument:
    """Undo ``as_table``; columns of no known measure are left out."""
    known = [one.column for one in TOKEN_MEASURES.values() if one.column in table.column_names]
    columns = {name: table[name].to_numpy().astype(np.float64) for name in ("tokens", *known)}
    return PerDocument(columns.pop("tokens"), columns)


def as_table(per_document: PerDocument, prompt_ids: Sequence[str] = ()) -> pa.Table:
    """Lay out per-document sums as a table, one row a document, with the documents' prompts where they are given."""
    named = {"prompt_id": prompt_ids} if prompt_ids else {}
    return pa.table({**named, "tokens": per_document.tokens, **per_document.sums})


def write_items(folder: Path, tables: Mapping[str, pa.Table]) -> dict[str, str]:
    """Write per-item tables as ``samples/<task>.parquet`` in an evaluation's folder; equal tables give equal bytes.

    Returns the sha256 of each file by its name.
    """
    written = {}
    for name, table in tables.items():
        with atomic_path(folder / "samples" / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")
            written[f"{name}.parquet"] = sha256(temporary)
    return written


def lost_items(folder: Path, written: Iterable[str]) -> list[str]:
    """List the tables of an evaluation's folder that are not there any more."""
    return [name for name in written if not (folder / "samples" / name).exists()]


def is_scored(table: pa.Table) -> bool:
    """Tell whether a table of items is of a task that is no multiple choice, whose items have a score of their own."""
    return SCORE in table.column_names


def is_rolling(table: pa.Table) -> bool:
    """Tell whether a table of items is of a task that scores whole documents."""
    return ROLLING in table.column_names


def rolling_value(table: pa.Table, measure: RollingMeasure) -> float:
    """Return a measure of all of a table's whole documents."""
    sizes = table[measure.size].to_numpy().astype(np.float64)
    return measure.of_nats(-float(table[ROLLING].to_numpy().sum()) / float(sizes.sum()))


def whole_bits(table: pa.Table) -> tuple[Array, Array]:
    """Return −log₂ likelihood of each whole document, (documents,), and its bytes."""
    return -table[ROLLING].to_numpy() / math.log(2), table["bytes"].to_numpy().astype(np.float64)


def scores(table: pa.Table) -> NDArray[np.generic]:
    """Return each item's own score, (items,), bool where all are right or wrong."""
    values = table[SCORE].to_numpy().astype(np.float64)
    return values.astype(np.bool_) if np.isin(values, (0, 1)).all() else values


def right_bits(table: pa.Table) -> tuple[Array, Array]:
    """Return −log₂ likelihood of each item's right choice, (items,), and its bytes, or characters where none are kept.

    Items without a right choice have 0 of both.
    """
    sizes = table["bytes" if "bytes" in table.column_names else "lengths"].to_pylist()
    golds = table["gold"].to_pylist()

    def bits(column: str) -> Array:
        rows = zip(table[column].to_pylist(), golds, strict=True)
        return np.array([-said[gold] / math.log(2) if gold >= 0 else 0.0 for said, gold in rows])

    lengths = np.array([size[gold] if gold >= 0 else 0 for size, gold in zip(sizes, golds, strict=True)], np.float64)
    own = bits("loglikelihoods")
    return (weighed(table, own, bits(TEACHERS)) if WEIGHT in table.column_names else own), lengths


def item_values(table: pa.Table, measure: ItemMeasure) -> NDArray[np.generic]:
    """Return a measure of each item, (items,), bool where all are right or wrong.

    It is its own column, or computed of the choices'. Of a task of which only some items were asked it is the teacher's
    and, where asked, the difference to it as many times as the item counts: the mean is unbiased, and single items may
    lie outside of 0 to 1.
    """
    kind = np.bool_ if measure.binary else np.float64
    if measure.name in table.column_names:
        own = np.array(table[measure.name].to_pylist(), kind)
    else:
        own = np.array(_of_choices(table, measure, "loglikelihoods"), kind)
    if WEIGHT not in table.column_names:
        return own
    found = weighed(table, own.astype(np.float64), np.array(_of_choices(table, measure, TEACHERS)))
    return found.astype(np.bool_) if measure.binary and np.isin(found, (0, 1)).all() else found


def _of_choices(table: pa.Table, measure: ItemMeasure, likelihoods: str) -> list[float]:
    columns = (table[name].to_pylist() for name in (likelihoods, "lengths", "gold"))
    return [measure.per_item(Choices(*row)) for row in zip(*columns, strict=True)]


def weighed(table: pa.Table, own: Array, teachers: Array) -> Array:
    """Return the teacher's values and the differences to them, each as many times as its item counts, (items,)."""
    return teachers + table[WEIGHT].to_numpy() * (own - teachers)
