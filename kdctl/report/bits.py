"""Bits per byte of right answers: how well a model would compress them."""

from collections.abc import Iterator, Sequence

import numpy as np

from kdctl import stats
from kdctl.report.columns import AVERAGE, Results
from kdctl.report.contrasts import Row, baseline
from kdctl.report.tables import Block, Cell, Column, Table, estimated, without_empty
from kdctl.run.documents import Array
from kdctl.run.records import Estimate
from kdctl.stats import Ratio


def bits(results: Results) -> Table:
    """List bits per byte of the right choices, and their paired differences to the PTQ student and the teacher."""
    parts = [(AVERAGE, results.choices)] if len(results.choices) > 1 else []
    parts += [(task.removesuffix("_offline"), (task,)) for task in results.choices]
    rows = [row for name, tasks in parts for row in _rows(results, name, tasks)]
    columns = (
        Column("model", "model"),
        Column("task", "on"),
        Column("bits", "bits per byte [95 %]", "kl"),
        Column("ptq_difference", "less the PTQ student's [95 %]", "kl"),
        Column("teacher_difference", "less the teacher's [95 %]", "kl"),
        Column("blur", "half interval over what quantization cost", "blur"),
    )
    note = (
        "−log₂ likelihood of the right choice over its bytes, lower is better, paired by item; of evaluations that "
        "kept no bytes over its characters, which are as many in plain English. Half interval: of the difference to "
        "the PTQ student, over that between PTQ student and teacher. Not corrected for being several."
    )
    return without_empty(Table("bits", "Bits per byte of right answers", columns, (Block("", tuple(rows)),), (note,)))


def _rows(results: Results, name: str, tasks: Sequence[str]) -> Iterator[tuple[Cell, ...]]:
    for row in results.rows:
        own = bits_per_byte(row, tasks)
        if own is None:
            continue
        ptq, teacher = (baseline(results.study, results.all_rows, row, kind) for kind in ("ptq", "teacher"))
        others = [
            bits_per_byte(row, tasks, base) if base and row.kind != "teacher" else None for base in (ptq, teacher)
        ]
        cost = bits_per_byte(ptq, tasks, teacher) if ptq and teacher else None
        gain = others[0]
        blur = (gain.high - gain.low) / 2 / abs(cost.value) if gain and cost and cost.value else None
        yield Cell(row.name), Cell(name), estimated(own), *map(estimated, others), Cell(blur)


def bits_per_byte(row: Row, tasks: Sequence[str], base: Row | None = None) -> Estimate | None:
    """Estimate a row's bits per byte over tasks, less those of another; None where any likelihood was not kept."""
    ratios = {}
    for task in tasks:
        own, other = _right(row, task), _right(base, task) if base else None
        if own is None or (base and other is None):
            return None
        less = other[0] if other else 0.0
        ratios[task] = Ratio(own[0] - less, own[1], row.clusters(task))
    return stats.average_ratio(ratios) if ratios else None


def _right(row: Row, task: str) -> tuple[Array, Array] | None:
    """Return bits of each right choice, the mean of a row's seeds, and bytes; None where any was not kept."""
    found = [one for model in row.models if (one := model.right(task)) is not None]
    return (np.mean([one.bits for one in found], axis=0), found[0].bytes) if len(found) == len(row.models) else None
