"""What each setting changes: variants that differ in it alone, against each other."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from kdctl.report.bits import bits_per_byte
from kdctl.report.columns import SETTINGS, Results, written
from kdctl.report.contrasts import Row, Sums, baseline, differs, over_documents, over_seeds, per_byte
from kdctl.report.layouts import SWEEPS, Sweep, alike, headings
from kdctl.report.study import HELDOUT, PTQ_WRITTEN, STUDENT_WRITTEN, Text
from kdctl.report.tables import Block, Cell, Column, Table, estimated, without_empty
from kdctl.run.measures import FORWARD_KL, P_RIGHT, REVERSE_KL, TokenMeasure
from kdctl.run.records import Estimate

KL_MARGIN = 0.02
"""Differences in KL below this share of the PTQ student's own are too small to matter."""
KLS: tuple[tuple[str, TokenMeasure, Text], ...] = (
    ("KL on the teacher's text", FORWARD_KL, HELDOUT),
    ("reverse KL on the teacher's text", REVERSE_KL, HELDOUT),
    ("KL on the PTQ student's text", FORWARD_KL, PTQ_WRITTEN),
    ("reverse KL on the PTQ student's text", REVERSE_KL, PTQ_WRITTEN),
    ("KL on its own text", FORWARD_KL, STUDENT_WRITTEN),
)
WHICH = (Column("change", "setting"), Column("where", "at"))


@dataclass(frozen=True)
class Pair:
    """Two rows that differ in one setting. change: what becomes what; where: the settings that they share."""

    base: Row
    row: Row
    change: str
    where: str

    def cells(self, measure: str) -> tuple[Cell, Cell, Cell]:
        """Write which pair is compared by which measure."""
        return Cell(self.change), Cell(self.where), Cell(measure)


def effects(results: Results) -> list[Table]:
    """List every pair of variants that differ in one setting: distances, answers, and what they write."""
    pairs = list(_pairs(results))
    return [table for table in (_distances(results, pairs), _answers(results, pairs), _texts(pairs)) if table.rows]


def _pairs(results: Results) -> Iterator[Pair]:
    for which in SWEEPS.values():
        groups = alike(results.rows, which)
        label = SETTINGS[which.field][0]
        for group, where in zip(groups, headings([group[0] for group in groups], which), strict=True):
            for base, row in combinations(group, 2):
                first, second = (written(vars(one.settings)[which.field]) for one in (base, row))
                along = _along(group, base, row, which)
                if first != second and along is not None:
                    yield Pair(base, row, f"{label} {first} → {second}", ", ".join(filter(None, (where, along))))


def _along(group: Sequence[Row], base: Row, row: Row, which: Sweep) -> str | None:
    """Name the settings that may vary along with one and are the same in a pair; None where they differ.

    A setting that one of the two does not have, as λ = 0 has no rollout length, is no difference.
    """
    named = []
    for field in which.ignored:
        mine = {vars(one.settings)[field] for one in (base, row)} - {None}
        if len(mine) > 1:
            return None
        if len({vars(one.settings)[field] for one in group} - {None}) > 1:
            named += [f"{SETTINGS[field][0]} = {written(value)}" for value in mine]
    return ", ".join(named)


@dataclass(frozen=True)
class Change:
    """What one setting changes in KL, in shares of the PTQ student's own; None where it was not measured."""

    change: str
    where: str
    on: Mapping[Text, Estimate]
    """By who wrote the text."""


def setting_changes(results: Results) -> list[Change]:
    """List what each setting changes, where it was measured on anything."""
    found = [Change(pair.change, pair.where, _shares(results, pair)) for pair in _pairs(results)]
    return [one for one in found if one.on]


def _shares(results: Results, pair: Pair) -> dict[Text, Estimate]:
    shares: dict[Text, Estimate] = {}
    for _, measure, text in KLS:
        if measure is FORWARD_KL and (found := _compared(results, pair, measure, text)) is not None:
            shares[text] = _scaled(found.difference, found.start)
    return shares


@dataclass(frozen=True)
class Compared:
    """A measure of a pair. start: the PTQ student's own."""

    base: Sums
    row: Sums
    start: float
    difference: Estimate
    over_documents: Estimate
    """The difference's interval without what seeds add."""


def _compared(results: Results, pair: Pair, measure: TokenMeasure, text: Text) -> Compared | None:
    """Compare a pair by a measure; None where any of it, or the PTQ student's, is missing."""
    ptq = baseline(results.study, results.all_rows, pair.base, "ptq")
    if text == PTQ_WRITTEN and not _on_one_text(pair, ptq):
        return None
    base, row = pair.base.sums(measure, text), pair.row.sums(measure, text)
    start = ptq.sums(measure, text) if ptq else None
    if base is None or row is None or start is None or not start.value > 0:
        return None
    found = over_documents(base, row)
    return Compared(base, row, start.value, over_seeds(found, base, row), found)


def _on_one_text(pair: Pair, ptq: Row | None) -> bool:
    """Tell whether the PTQ student's text is the same for all; it is not where folders have students of their own."""
    models = [*pair.base.models, *pair.row.models, *(ptq.models if ptq else ())]
    return len({model.result.ptq_text if model.result else None for model in models}) == 1


def _scaled(found: Estimate, unit: float) -> Estimate:
    return Estimate(**{name: value / unit for name, value in found.model_dump().items()})


def _distances(results: Results, pairs: Sequence[Pair]) -> Table:
    """Compare KL on what the teacher wrote, what the PTQ student wrote, and what each student wrote itself."""
    rows = []
    for pair in pairs:
        for label, measure, text in KLS:
            if (found := _compared(results, pair, measure, text)) is None:
                continue
            share = estimated(_scaled(found.difference, found.start))
            numbers = (Cell(found.base.value), Cell(found.row.value), estimated(found.difference), share)
            words = verdict(found, KL_MARGIN * found.start)
            rows.append((*pair.cells(label), *numbers, Cell(words)))
    columns = (
        *WHICH,
        Column("measure", "measure"),
        Column("base", "before", "kl"),
        Column("value", "after", "kl"),
        Column("difference", "difference [95 %]", "kl"),
        Column("share", "of the PTQ student's, % [95 %]", "percent"),
        Column("verdict", "verdict"),
    )
    note = (
        "Variants that differ in one setting, paired over held-out documents, or over prompts where each student wrote "
        f"its own; nats a token. Equivalent: within ±{100 * KL_MARGIN:g} % of the PTQ student's own. Intervals of one "
        "seed do not hold how much another would differ, and are not corrected for being several."
    )
    return without_empty(Table("effects", "What each setting changes", columns, (Block("", tuple(rows)),), (note,)))


def verdict(found: Compared, margin: float) -> str:
    """Say which of two KLs is lower, or that they are alike; where neither is sure, what would decide."""
    difference, documents = found.difference, found.base.tops.shape[1]
    sure, small = differs(difference), max(-difference.low, difference.high) < margin
    which = "better" if difference.value < 0 else "worse"
    if sure:
        return f"{which}, by less than the margin" if small else which
    if small:
        return "equivalent"
    half = (found.over_documents.high - found.over_documents.low) / 2
    needed = math.ceil(documents * (half / margin) ** 2)
    if needed <= documents:
        return "cannot tell; seeds differ, and more of them would see differences of the margin"
    return f"cannot tell; {needed} documents would see differences of the margin"


def _plain(difference: Estimate) -> str:
    """Say which of two is lower, where that is sure."""
    if not differs(difference):
        return "cannot tell"
    return "better" if difference.value < 0 else "worse"


def _answers(results: Results, pairs: Sequence[Pair]) -> Table:
    """Compare probabilities of right answers, and the scores of tasks that generate."""
    rows = []
    parts = [(P_RIGHT.heading, results.choices, P_RIGHT.name)] if results.choices else []
    parts += [(task.removesuffix("_offline"), (task,), "") for task in results.tasks if task not in results.choices]
    for pair in pairs:
        if (gone := bits_per_byte(pair.row, results.choices, pair.base)) is not None:
            rows.append((*pair.cells("bits per byte"), estimated(gone), Cell(), Cell(_plain(gone))))
        for label, tasks, measure in parts:
            found = results.contrasts.over(pair.base, pair.row, tasks, measure)
            if found is not None:
                rows.append((*pair.cells(label), estimated(found.difference), Cell(found.mde), Cell(found.words)))
        for task in results.rolling:
            if (gone := per_byte(pair.row, task, pair.base)) is not None:
                label = f"bits per byte, {task.removesuffix('_offline')}"
                rows.append((*pair.cells(label), estimated(gone), Cell(), Cell(_plain(gone))))
    columns = (
        *WHICH,
        Column("measure", "measure"),
        Column("difference", "difference [95 %]", "kl"),
        Column("mde", "detectable", "kl"),
        Column("verdict", "verdict"),
    )
    note = (
        "Paired by item. Bits per byte of the right answer, fewer are better, and P(right), a share of 1, are averages "
        "over the multiple-choice tasks; scores are shares of 1. Not corrected for being several."
        + (" Bits per byte of a task's whole documents: fewer are better." if results.rolling else "")
    )
    title = "What each setting changes in answers"
    return Table("effects_answers", title, columns, (Block("", tuple(rows)),), (note,))


def _texts(pairs: Sequence[Pair]) -> Table:
    """Compare how long students' own completions of the held-out prompts are, and how many end."""
    rows = []
    for pair in pairs:
        found = (_own_lengths(pair.base), _own_lengths(pair.row))
        if found[0] is not None and found[1] is not None:
            labels = ("tokens", "end by themselves, %")
            for label, first, second in zip(labels, found[0], found[1], strict=True):
                difference = over_seeds(over_documents(first, second), first, second)
                rows.append((*pair.cells(label), Cell(first.value), Cell(second.value), estimated(difference)))
    columns = (
        *WHICH,
        Column("measure", "completions"),
        Column("base", "before", "ratio"),
        Column("value", "after", "ratio"),
        Column("difference", "difference [95 %]", "ratio"),
    )
    note = "Of the students' own completions of the held-out prompts, paired by prompt."
    return Table(
        "effects_text", "What each setting changes in what is written", columns, (Block("", tuple(rows)),), (note,)
    )


def _own_lengths(row: Row) -> tuple[Sums, Sums] | None:
    """Return tokens, and percent that end, of each completion that a row's models wrote."""
    found = [model.own_completions for model in row.models]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    tokens, ended = (np.stack([one[place] for one in known]) for place in (0, 1))
    return Sums(tokens, np.ones_like(tokens)), Sums(100 * ended, np.ones_like(ended))
