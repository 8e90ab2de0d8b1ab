"""What single benchmark items and held-out documents said, read back for paired statistics (no torch)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdctl.base.errors import brief
from kdctl.run.documents import (
    PerDocument,
    from_table,
    is_rolling,
    is_scored,
    item_values,
    right_bits,
    scores,
    whole_bits,
)
from kdctl.run.files import sha256
from kdctl.run.measures import FORWARD_KL, ITEM_MEASURES, PERPLEXITY, TEACHER_PERPLEXITY, derived_measures
from kdctl.run.record_files import damaged

DERIVED = {one.name for one in derived_measures()}
NEEDED = (FORWARD_KL, PERPLEXITY, TEACHER_PERPLEXITY)
"""What a report reads by name; other measures have a column where they were taken."""
CHOICES = {"loglikelihoods", "lengths", "gold"}
"""What is kept of multiple choice, but not in tables of before."""
TEACHER_TOLERANCE = 0.02
NO_SUMS: Mapping[str, str] = MappingProxyType({})
"""What results say of their items that were written before there were hashes of them."""


@dataclass(frozen=True)
class Items:
    """One model's answers to one task, ordered by item id, (items,) each."""

    ids: NDArray[np.str_]
    """Hash of everything that was asked: prompt, few-shot examples and choices."""
    places: NDArray[np.str_]
    """Subtask and number of the document, which stay the same where only the wording of the prompt changes."""
    labels: NDArray[np.str_]
    """Equal for items that are not independent."""
    values: NDArray[np.generic]
    """What the answers are worth by one measure: bool where it is right or wrong, else float64 in [0, 1]; of whole
    documents their bits per byte, of which fewer are better."""

    @property
    def clusters(self) -> NDArray[np.str_] | None:
        """Label items by subject or twin sentence, where the task has such; None where items are independent."""
        return self.labels if len(np.unique(self.labels)) > 1 else None


def read_items(path: Path, metric: str, sums: Mapping[str, str] = NO_SUMS) -> Items | None:
    """Read ``samples/<task>.parquet`` by a measure or what lm-eval calls a task's own; None where there is none.

    sums: the files' hashes, where the results name them. Raises StoreError if it is damaged, or named and missing.
    """
    table = _read(path, ["item_id", "subtask", "cluster", "doc_index"], sums)
    if table is None:
        return None
    if is_scored(table) or is_rolling(table):
        if metric in DERIVED:
            return None  # there are no choices
        return _items(table, scores(table) if is_scored(table) else np.divide(*whole_bits(table)))
    measure = ITEM_MEASURES[metric]
    if measure.reported:
        _check_columns(path, table, [metric])
    elif not {*table.column_names} >= CHOICES:
        return None  # a table of before they were kept
    return _items(table, item_values(table, measure))


@dataclass(frozen=True)
class Bits:
    """What the right choices, or the whole documents, of one task cost a model, ordered by item id, (items,) each."""

    bits: NDArray[np.float64]
    bytes: NDArray[np.float64]


def read_bits(path: Path, sums: Mapping[str, str] = NO_SUMS) -> Bits | None:
    """Read the likelihoods of right choices or of whole documents like ``read_items``; None where none were kept."""
    table = _read(path, ["item_id"], sums)
    if table is None or not (is_rolling(table) or {*table.column_names} >= CHOICES):
        return None
    return Bits(*(whole_bits if is_rolling(table) else right_bits)(table.sort_by("item_id")))


def _items(table: pa.Table, values: NDArray[np.generic]) -> Items:
    ids = np.array(table["item_id"].to_pylist(), np.str_)
    order = np.argsort(ids)
    subtasks = np.array(table["subtask"].to_pylist(), np.str_)
    numbers = np.array([str(index) for index in table["doc_index"].to_pylist()], np.str_)
    places = np.char.add(np.char.add(subtasks, " "), numbers)
    labels = np.array(table["cluster"].to_pylist(), np.str_)
    return Items(ids[order], places[order], labels[order], values[order])


def read_documents(path: Path, sums: Mapping[str, str] = NO_SUMS) -> PerDocument | None:
    """Read ``heldout.parquet`` like ``read_items``."""
    table = _read(path, ["tokens", *(measure.column for measure in NEEDED)], sums)
    return None if table is None else from_table(table)


def read_by_prompt(path: Path, sums: Mapping[str, str] = NO_SUMS) -> PerDocument | None:
    """Read sums of documents like ``read_documents``, ordered by the prompts that they complete."""
    table = _read(path, ["prompt_id", "tokens", FORWARD_KL.column], sums)
    return None if table is None else from_table(table.sort_by("prompt_id"))


def _read(path: Path, needed: list[str], sums: Mapping[str, str]) -> pa.Table | None:
    if not path.exists() and path.name not in sums:
        return None
    try:
        if path.name in sums and sha256(path) != sums[path.name]:
            raise damaged(path, "it is not the file that the results were computed from")
        table = pq.read_table(path)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise damaged(path, brief(error)) from None
    _check_columns(path, table, needed)
    return table


def _check_columns(path: Path, table: pa.Table, needed: list[str]) -> None:
    if missing := [name for name in needed if name not in table.column_names]:
        raise damaged(path, f"it has no column {missing[0]}")


def item_differences(a: Items, b: Items) -> list[str]:
    """Say how the questions of two models differ; nothing where they are the same."""
    if np.array_equal(a.ids, b.ids):
        return []
    if len(a.ids) != len(b.ids):
        return [f"{len(a.ids)} items and {len(b.ids)}"]
    other = len(np.setdiff1d(a.ids, b.ids))
    if set(a.places) == set(b.places):
        return [f"{other} of {len(a.ids)} items were asked with another prompt"]
    return [f"{other} of {len(a.ids)} items are others"]


def document_differences(a: PerDocument, b: PerDocument) -> list[str]:
    """Say how the held-out documents of two models differ; nothing where they are the same.

    Equal token counts and, but for the numerics of batches, equal likelihoods under the teacher are equal documents.
    """
    if len(a.tokens) != len(b.tokens):
        return [f"{len(a.tokens)} held-out documents and {len(b.tokens)}"]
    first, second = a[TEACHER_PERPLEXITY], b[TEACHER_PERPLEXITY]
    equal = (a.tokens == b.tokens) & np.isclose(first, second, rtol=TEACHER_TOLERANCE, atol=0.5)
    return [] if equal.all() else [f"{int((~equal).sum())} of {len(equal)} held-out documents are others"]
