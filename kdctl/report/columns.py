"""Columns of result tables: settings, accuracies, distances, with marks of what differs and what is best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kdctl import stats
from kdctl.report.contrasts import (
    SIGNIFICANT,
    Contrasts,
    Found,
    Judged,
    Row,
    baseline,
    differs,
    judge,
    per_byte,
    per_token,
    per_token_difference,
    rows_of,
)
from kdctl.report.study import Kind, Study
from kdctl.report.tables import Block, Cell, Column, Style, estimated
from kdctl.run.measures import ITEM_MEASURES, P_RIGHT, TokenMeasure, Unit, column_measures, derived_measures
from kdctl.run.records import Estimate

AVERAGE = "average"
TIED = "≈"
BASELINES: dict[Kind, str] = {"ptq": "P", "teacher": "T"}
ARROWS = {"better": "↑", "worse": "↓", "equivalent": "="}
STYLES: dict[Unit, Style] = {"nats": "kl", "share": "percent", "perplexity": "perplexity"}
SETTINGS: dict[str, tuple[str, Style]] = {
    "lmbda": ("λ", "number"),
    "beta": ("β", "number"),
    "lr": ("lr", "number"),
    "steps": ("steps", "number"),
    "batch_size": ("batch size", "number"),
    "max_new_tokens": ("rollout length", "number"),
    "train": ("trains", "text"),
    "rank": ("rank", "number"),
    "mix": ("prompts", "text"),
    "method": ("method", "text"),
    "grid": ("grid", "text"),
}


@dataclass(frozen=True)
class Scale:
    """What a column of results is ranked by."""

    key: str
    column: Column
    tasks: tuple[str, ...] = ()
    measure: TokenMeasure | None = None
    items: str = ""
    """The measure of items, where it is not the tasks' headline."""
    rolling: str = ""
    """The task, where it scores whole documents."""

    @property
    def lower(self) -> bool:
        """Tell whether less is better."""
        return bool(self.rolling) or (self.measure is not None and self.measure.better == "lower")


class Results:
    """A study's rows and everything that is compared in one table of them."""

    def __init__(self, study: Study, contrasts: Contrasts, rows: Sequence[Row] | None = None):
        self.study, self.contrasts = study, contrasts
        self.all_rows = rows_of(study)
        self.rows = self.all_rows if rows is None else list(rows)
        self.tasks, self.rolling = tuple(study.tasks), tuple(study.rolling)
        self.averages = judge(self._family([self.tasks]))
        self.choices = tuple(task for task in self.tasks if self._has_choices(task))
        self.derived = [one.name for one in derived_measures() if one.heading and self.choices]
        self.beside = {
            name: judge(self._family([self.choices], name), ITEM_MEASURES[name].unit) for name in self.derived
        }
        self.single = judge(self._family([(task,) for task in self.tasks] if len(self.tasks) > 1 else []))

    def _has_choices(self, task: str) -> bool:
        """Tell whether a task is multiple choice, its likelihoods kept."""
        return any(row.answers(task, P_RIGHT.name) is not None for row in self.all_rows)

    def _family(self, parts: Sequence[tuple[str, ...]], measure: str = "") -> dict[tuple[str, ...], Found | None]:
        return {
            (row.name, kind, *part): self.contrasts.over(base, row, part, measure)
            for row in self.rows
            if row.kind != "teacher"
            for kind in BASELINES
            if (base := baseline(self.study, self.all_rows, row, kind)) is not None
            for part in parts
        }

    def judged(self, row: Row, kind: Kind, tasks: Sequence[str], measure: str = "") -> Judged | None:
        """Return the comparison of a row with its baseline on one task or on the average of all, by a measure."""
        if measure:
            return self.beside[measure].get((row.name, kind, *tasks))
        family = self.averages if tuple(tasks) == self.tasks else self.single
        return family.get((row.name, kind, *tasks))

    @property
    def scales(self) -> list[Scale]:
        """List the columns of results: every task, their average, whole documents, KL and held-out perplexity."""
        found = [Scale(task, Column(task, task.removesuffix("_offline"), "percent"), (task,)) for task in self.tasks]
        if len(found) > 1:
            found.append(Scale(AVERAGE, Column(AVERAGE, "average", "percent"), self.tasks))
        for name in self.derived:
            found.append(Scale(name, Column(name, ITEM_MEASURES[name].heading, "kl"), self.choices, items=name))
        found += [Scale(task, rolling_column(task), rolling=task) for task in self.rolling]
        return found + [Scale(one.name, measure_column(one), measure=one) for one in column_measures() if one.ranked]

    def cell(self, row: Row, scale: Scale) -> Cell:
        """Write a row's result with the marks of what it differs from."""
        marks = tuple(self._distance_marks(row, scale)) if row.kind != "teacher" else ()
        if scale.rolling:
            return replace(estimated(per_byte(row, scale.rolling)), marks=marks)
        if scale.measure is None:
            cell = accuracy_cell(row, scale.tasks, scale.items)
            return replace(cell, marks=self._accuracy_marks(row, scale.tasks, scale.items))
        if row.kind == "teacher" and scale.measure.of == "pair":
            return Cell()
        return replace(distance_cell(row, scale.measure), marks=marks)

    def _accuracy_marks(self, row: Row, tasks: Sequence[str], measure: str) -> tuple[str, ...]:
        judged = [(letter, self.judged(row, kind, tasks, measure)) for kind, letter in BASELINES.items()]
        return tuple(letter + ARROWS[one.verdict] for letter, one in judged if one and one.verdict in ARROWS)

    def _distance_marks(self, row: Row, scale: Scale) -> Sequence[str]:
        """Mark what is better or worse than a baseline's; the teacher has no distance to itself."""
        marks = []
        for kind, letter in BASELINES.items():
            base = baseline(self.study, self.all_rows, row, kind)
            if base is None or (kind == "teacher" and scale.measure and scale.measure.of == "pair"):
                continue
            difference = _difference(base, row, scale)
            if difference is not None and differs(difference):
                marks.append(letter + ("↑" if (difference.value < 0) == scale.lower else "↓"))
        return marks

    def ranked(self, rows: Sequence[Row], scale: Scale) -> Mapping[str, Cell]:
        """Write one column of a block, the best student in bold or the best ones marked as tied."""
        cells = {row.name: self.cell(row, scale) for row in rows}
        students = [row for row in rows if row.kind != "teacher" and isinstance(cells[row.name].value, float)]
        if len(students) < 2:
            return cells
        sign = -1 if scale.lower else 1
        best, *others = sorted(students, key=lambda row: -sign * float(cells[row.name].value or 0))
        tied = self._tied(best, others, scale)
        if tied is None:
            return cells
        if not tied:
            return cells | {best.name: replace(cells[best.name], bold=True)}
        for row in [best, *tied]:
            cells[row.name] = replace(cells[row.name], marks=(*cells[row.name].marks, TIED))
        return cells

    def _tied(self, best: Row, others: Sequence[Row], scale: Scale) -> list[Row] | None:
        """List the rows that cannot be told from the best; None where that cannot be known."""
        if scale.measure is not None or scale.rolling:
            found = [_difference(best, row, scale) for row in others]
            tied = [row for row, one in zip(others, found, strict=True) if not differs(one)]
            return None if None in found else tied
        judged = judge({(row.name,): self.contrasts.over(best, row, scale.tasks, scale.items) for row in others})
        tied = [row for row in others if (one := judged.get((row.name,))) and one.p_holm >= SIGNIFICANT]
        return tied if len(judged) == len(others) else None


def _difference(base: Row, row: Row, scale: Scale) -> Estimate | None:
    """Estimate how a row differs where no item is right or wrong."""
    if scale.rolling:
        return per_byte(row, scale.rolling, base)
    return per_token_difference(base, row, scale.measure) if scale.measure else None


def accuracy_cell(row: Row, tasks: Sequence[str], measure: str = "") -> Cell:
    """Write an accuracy ± one standard error: of one task, or the average of several; of items where they are kept."""
    if not all(task in model.scores for model in row.models for task in tasks):
        return Cell()
    answers = {task: found for task in tasks if (found := row.answers(task, measure)) is not None}
    if len(answers) == len(tasks):
        estimate, error = stats.average_seeds(answers, {task: row.clusters(task) for task in tasks})
        return Cell(estimate.value, error)
    if measure:
        return Cell()
    value = float(np.mean([[model.scores[task].value for task in tasks] for model in row.models]))
    errors = [row.models[0].scores[task].standard_error for task in tasks]
    known = [error for error in errors if error is not None]
    single = len(row.models) == 1 and len(known) == len(tasks)
    return Cell(value, float(np.hypot.reduce(known)) / len(tasks) if single else None)


def rolling_column(task: str) -> Column:
    """Describe the column of a task that scores whole documents."""
    return Column(task, f"{task.removesuffix('_offline')}, bits per byte [95 %]", "kl")


def measure_column(measure: TokenMeasure) -> Column:
    """Describe the column of a measure of held-out tokens."""
    return Column(measure.name, measure.heading + ("" if measure.exponent else " [95 %]"), STYLES[measure.unit])


def measure_cell(measure: TokenMeasure, estimate: Estimate | None) -> Cell:
    """Write a measure with its interval, but exp of a mean without."""
    if estimate is None or measure.exponent:
        return Cell(estimate.value if estimate else None)
    return Cell(estimate.value, low=estimate.low, high=estimate.high)


def distance_cell(row: Row, measure: TokenMeasure) -> Cell:
    """Write a measure of a row; as taken when the model was made where documents are not kept."""
    found = per_token(row, measure)
    if found is not None:
        return measure_cell(measure, stats.exponential(found) if measure.exponent else found)
    summary = row.models[0].distribution if len(row.models) == 1 else None
    return measure_cell(measure, summary.estimate(measure) if summary else None)


def served_notes(rows: Sequence[Row]) -> list[str]:
    """Say how models were measured that a server served."""
    served = {one.name: one.result.served for row in rows for one in row.models if one.result and one.result.served}
    if not served:
        return []
    named = "; ".join(f"{name} is {what}" for name, what in served.items())
    return [f"{named}. A server states no distribution: its KL is estimated by the drawn tokens, with wider intervals."]


def block(results: Results, heading: str, rows: Sequence[Row], own: Sequence[Callable[[Row], Cell]]) -> Block:
    """Put rows together: what is their own (name, settings), then results ranked among them."""
    ranked = [results.ranked(rows, scale) for scale in results.scales]
    return Block(heading, tuple((*(make(row) for make in own), *(cells[row.name] for cells in ranked)) for row in rows))


def written(value: object) -> str:
    """Write the value of a setting in a text."""
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)


def setting_column(name: str) -> Column:
    """Describe the column of one setting."""
    label, style = SETTINGS[name]
    return Column(name, label, style)


def setting_cell(row: Row, name: str) -> Cell:
    """Write one setting of a row."""
    return Cell(vars(row.settings)[name])
