"""The seconds that a student took, and how near to the teacher it came: the figure and the table of them."""

from dataclasses import dataclass

import numpy as np

from kdctl.report.charts import Mark, mark
from kdctl.report.columns import Results
from kdctl.report.contrasts import Row, baseline
from kdctl.report.marks import kl_mark, short
from kdctl.report.study import Model
from kdctl.report.tables import Block, Cell, Column, Table

FIRST = "gptq"
"""The method that others are measured against, where it is there."""


@dataclass(frozen=True)
class Spent:
    """A student, the method that quantized it, its seconds and its held-out KL.

    method: empty for a variant, which training made. compared: measured by --compare and not kept.
    """

    name: str
    method: str
    seconds: float
    kl: Mark
    compared: bool = False


def quantized(results: Results) -> list[Spent]:
    """List what --compare measured, and PTQ students, which need not be measured twice."""
    students = [row for row in results.rows if row.kind == "ptq"]
    reports = [(report, kl_mark(row)) for row in students if (report := row.models[0].quantized)]
    own = {report.method for report, _ in reports}
    compared = [found for source in results.study.sources for found in source.methods if found.method not in own]
    found = [Spent(one.method, one.method, one.seconds_s, mark(one.distribution.forward_kl), True) for one in compared]
    found += [Spent(f"PTQ student ({one.method})", one.method, one.seconds_s, level) for one, level in reports if level]
    return found


def from_the_start(results: Results, model: Model) -> float | None:
    """Return the seconds of a variant's training and of quantizing the student that it began from."""
    ptq = baseline(results.study, results.all_rows, Row(model.name, (model,)), "ptq")
    began = ptq.models[0].quantized if ptq else None
    return began.seconds_s + model.distilled.train_seconds_s if began and model.distilled else None


def minutes_table(results: Results) -> Table | None:
    """Lay out what minutes bought; None unless --compare measured a method beside the student's own."""
    made = quantized(results)
    if not any(one.compared for one in made):
        return None
    first = min(made, key=lambda one: (one.method != FIRST, not one.compared, one.kl.value))
    rows = sorted(made, key=lambda one: one.seconds) + _trained(results)
    columns = (
        Column("model", "model"),
        Column("seconds", "seconds", "number"),
        Column("forward_kl", "KL [95 %]", "kl"),
        Column("removed", f"removed of {first.method}'s KL", "share"),
    )
    cells = tuple(
        (
            Cell(one.name),
            Cell(round(one.seconds, 1)),
            Cell(one.kl.value, low=one.kl.low, high=one.kl.high),
            _removed(one, first),
        )
        for one in rows
    )
    note = (
        "Seconds of quantizing and, for distilled students, of training after it; rollouts are not in them. KL per "
        f"held-out token in nats; removed: the share of {first.method}'s KL that is gone."
    )
    return Table("minutes", "KL and minutes", columns, (Block("", cells),), (note,))


def _trained(results: Results) -> list[Spent]:
    """List the variants, seeds averaged."""
    found = []
    for row in results.rows:
        seconds = [from_the_start(results, model) for model in row.models] if row.kind == "variant" else []
        known, level = [each for each in seconds if each is not None], kl_mark(row)
        if known and level:
            found.append(Spent(short(row.name), "", float(np.mean(known)), level))
    return found


def _removed(one: Spent, first: Spent) -> Cell:
    return Cell() if one is first else Cell(1 - one.kl.value / first.kl.value)
