"""What all figures share: how a row is named, which method made it, and its numbers with their intervals."""

import re
from collections.abc import Sequence

import numpy as np

from kdctl import stats
from kdctl.report.charts import Mark, mark
from kdctl.report.columns import SETTINGS, accuracy_cell, distance_cell, written
from kdctl.report.contrasts import Row
from kdctl.run.measures import FORWARD_KL

PERCENT = 100
METHODS = ("teacher", "PTQ", "off-policy", "mixed", "on-policy", "made elsewhere")


def method_of(row: Row) -> str:
    """Name the method after λ: 0 is off-policy, 1 on-policy, anything between mixed."""
    fixed = {"teacher": "teacher", "ptq": "PTQ", "foreign": "made elsewhere"}
    lmbda = row.settings.lmbda
    if row.kind in fixed:
        return fixed[row.kind]
    return "off-policy" if lmbda == 0 else "on-policy" if lmbda == 1 else "mixed"


def by_method(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Group rows by method, methods in their usual order, rows of a method by λ, β and learning rate."""
    ordered = sorted(rows, key=lambda row: [vars(row.settings)[name] or 0.0 for name in ("lmbda", "beta", "lr")])
    groups = [(method, [row for row in ordered if method_of(row) == method]) for method in METHODS]
    return [(method, members) for method, members in groups if members]


def short(name: str) -> str:
    """Shorten a variant's name where kdctl made it; names of a user's own stay."""
    pattern = r"lambda([^_]+)_beta([^_]+)_lr([^_ ]+)(_seed(?=\d))?"
    found = re.sub(pattern, lambda m: f"λ {m[1]}, β {m[2]}, lr {m[3]}" + (", seed " if m[4] else ""), name)
    return found if found == name else found.replace("_mix-", ", ")


def accuracy_mark(row: Row, tasks: Sequence[str]) -> Mark | None:
    """Estimate an accuracy in percent, of one task or the average of several; without items, only its value."""
    answers = {task: found for task in tasks if (found := row.answers(task)) is not None}
    if len(answers) < len(tasks) or not tasks:
        value = accuracy_cell(row, tasks).value if tasks else None
        return Mark(PERCENT * value) if isinstance(value, float) else None
    clusters = {task: row.clusters(task) for task in tasks}
    if len(tasks) == len(row.models) == 1 and answers[tasks[0]].dtype == np.bool_:
        return mark(stats.accuracy(answers[tasks[0]][0], clusters[tasks[0]]).estimate, PERCENT)
    return mark(stats.average_seeds(answers, clusters)[0], PERCENT)


def kl_mark(row: Row) -> Mark | None:
    """Estimate the KL to the teacher per held-out token, nats."""
    cell = distance_cell(row, FORWARD_KL)
    return Mark(cell.value, cell.low, cell.high) if isinstance(cell.value, float) else None


def varied(rows: Sequence[Row], names: Sequence[str], ignored: Sequence[str] = ()) -> list[list[Row]]:
    """Group the variants that differ in some settings only, where each of these has two values or more."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        if row.kind == "variant" and all(vars(row.settings)[name] is not None for name in names):
            origin = row.models[0].distilled
            key = (row.settings.key("seed", *names, *ignored), origin.student if origin else None)
            groups.setdefault(key, []).append(row)
    return [group for group in groups.values() if all(len(values(group, name)) > 1 for name in names)]


def values(rows: Sequence[Row], name: str) -> list[float]:
    """List the values of a setting, ascending; rows without it have none."""
    return sorted({value for row in rows if (value := vars(row.settings)[name]) is not None})


def telling(rows: Sequence[Row], without: Sequence[str]) -> list[str]:
    """Describe rows by the settings that tell them apart, by their names where none does."""
    names = [name for name in SETTINGS if name not in without and len({vars(row.settings)[name] for row in rows}) > 1]
    found = [", ".join(f"{SETTINGS[name][0]} {written(vars(row.settings)[name])}" for name in names) for row in rows]
    return found if len(set(found)) == len(found) else [short(row.name) for row in rows]
