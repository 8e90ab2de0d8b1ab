"""Rows of a report and their differences: a setting's seeds against a baseline's, item by item."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kdctl import stats
from kdctl.report.study import HELDOUT, Kind, Model, Settings, Study, Text
from kdctl.run.documents import Array, PerDocument
from kdctl.run.measures import ITEM_MEASURES, ScoreUnit, TokenMeasure
from kdctl.run.records import Estimate
from kdctl.stats import Paired, Ratio, Repeated
from kdctl.stats.findings import Comparison, SeedComparison
from kdctl.stats.verdicts import SAID

Found = Comparison | SeedComparison
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Sums:
    """A mean of each seed of a row: sums over documents and what they are divided by, (seeds, documents) each."""

    tops: Array
    bottoms: Array

    @property
    def value(self) -> float:
        """The mean over all seeds."""
        return float(self.tops.sum() / self.bottoms.sum())

    @property
    def of_seeds(self) -> list[float]:
        """The mean of each seed."""
        return [float(top.sum() / bottom.sum()) for top, bottom in zip(self.tops, self.bottoms, strict=True)]


@dataclass(frozen=True)
class Row:
    """One line of a table: a model, or several seeds of one setting."""

    name: str
    models: tuple[Model, ...]

    @property
    def kind(self) -> Kind:
        """What the models are."""
        return self.models[0].kind

    @cached_property
    def settings(self) -> Settings:
        """What the models have in common; no seed where they have several."""
        first = self.models[0].settings
        return first if len(self.models) == 1 else replace(first, seed=None)

    def answers(self, task: str, measure: str = "") -> NDArray[np.generic] | None:
        """What answers are worth, (seeds, items), by the headline or another measure; None where any are missing."""
        found = [items.values for model in self.models if (items := model.items(task, measure)) is not None]
        return np.stack(found) if len(found) == len(self.models) else None

    def clusters(self, task: str) -> list[str] | None:
        """Label items with their subject, apart from those of other tasks; None where items are independent."""
        items = self.models[0].items(task)
        labels = items.clusters if items is not None else None
        return None if labels is None else [f"{task}/{label}" for label in labels]

    def bits(self, task: str) -> Sums | None:
        """Return bits over bytes of a task's right choices or whole documents, as ``sums``."""
        found = [one for model in self.models if (one := model.bits(task)) is not None]
        if len(found) < len(self.models):
            return None
        return Sums(np.stack([one.bits for one in found]), np.stack([one.bytes for one in found]))

    @property
    def documents(self) -> list[PerDocument]:
        """Held-out documents of every model; empty where any model's are missing."""
        found = [model.documents for model in self.models if model.documents is not None]
        return found if len(found) == len(self.models) else []

    def sums(self, measure: TokenMeasure, text: Text = HELDOUT) -> Sums | None:
        """Return a measure of every model on each held-out document that somebody wrote; None where any are missing."""
        found = [model.on(text) for model in self.models]
        known = [one for one in found if one is not None and one.has(measure)]
        if len(known) < len(found):
            return None
        return Sums(np.stack([one[measure] for one in known]), np.stack([one.tokens for one in known]))


def rows_of(study: Study) -> list[Row]:
    """Make one row of each setting, in the order of the study."""
    groups = study.settings_groups()
    names = [_name(group, [model.key for model in group]) for group in groups]
    full = [_name(group, [model.name for model in group]) for group in groups]
    unique = [name if names.count(name) == 1 else other for name, other in zip(names, full, strict=True)]
    return [Row(name, tuple(group)) for name, group in zip(unique, groups, strict=True)]


def _name(group: Sequence[Model], names: Sequence[str]) -> str:
    """Name several seeds after what their names have in common, if that is all but the seed."""
    if len(group) == 1:
        return group[0].name
    seeds = [str(model.settings.seed) for model in group]
    stripped = {name.replace(f"_seed{seed}", "") for name, seed in zip(names, seeds, strict=True)}
    common = stripped.pop() if len(stripped) == 1 else " + ".join(names)
    return f"{common} (seeds {', '.join(seeds)})"


def baseline(study: Study, rows: Sequence[Row], row: Row, kind: Kind) -> Row | None:
    """Return the row of the teacher or the PTQ student that a row came from."""
    found = study.baseline(row.models[0], kind)
    return next((one for one in rows if found is not None and one.models[0] is found), None)


class Contrasts:
    """Differences row − base, each computed once; None where items or documents that it needs are missing."""

    def __init__(self, margin: float):
        self.margin = margin
        self._found: dict[tuple[str, str, tuple[str, ...], str], Found | None] = {}

    def over(self, base: Row, row: Row, tasks: Sequence[str], measure: str = "") -> Found | None:
        """Compare two rows on one task, or on the unweighted average of several, by their headline or a measure."""
        key = (base.name, row.name, tuple(tasks), measure)
        if key not in self._found:
            self._found[key] = self._compare(base, row, tasks, measure)
        return self._found[key]

    def _compare(self, base: Row, row: Row, tasks: Sequence[str], measure: str) -> Found | None:
        pairs = {}
        for task in tasks:
            first, second = base.answers(task, measure), row.answers(task, measure)
            if first is None or second is None:
                return None
            pairs[task] = Repeated(first, second, row.clusters(task))
        if not pairs:
            return None
        graded = not all(np.isin(one, (0, 1)).all() for pair in pairs.values() for one in (pair.a, pair.b))
        unit = ITEM_MEASURES[measure].unit if measure else "points"
        if graded or unit != "points" or len(base.models) > 1 or len(row.models) > 1:
            made = [one.kind == "variant" for one in (base, row)]
            return stats.compare_seeds_average(
                pairs, margin=self.margin, fixed=not made[0], b_fixed=not made[1], unit=unit
            )
        single = {
            task: Paired(np.asarray(pair.a)[0], np.asarray(pair.b)[0], pair.clusters) for task, pair in pairs.items()
        }
        return stats.compare_average(single, margin=self.margin)


def per_token(row: Row, measure: TokenMeasure) -> Estimate | None:
    """Estimate a row's mean of a measure per held-out token, with an interval over documents and seeds."""
    found = row.sums(measure)
    if found is None:
        return None
    return stats.widen(stats.ratio(found.tops.mean(0), found.bottoms.mean(0)), found.of_seeds)


def per_token_difference(base: Row, row: Row, measure: TokenMeasure) -> Estimate | None:
    """Estimate the difference row − base per held-out token, paired over documents, with the variance of seeds."""
    first, second = base.sums(measure), row.sums(measure)
    if first is None or second is None:
        return None
    return over_seeds(over_documents(first, second), first, second)


def over_documents(base: Sums, row: Sums) -> Estimate:
    """Estimate the difference row − base of two means, paired over documents."""
    before, after, counts, others = base.tops.mean(0), row.tops.mean(0), base.bottoms.mean(0), row.bottoms.mean(0)
    return stats.ratio_difference(before, after, counts, others)


def over_seeds(found: Estimate, base: Sums, row: Sums) -> Estimate:
    """Add the variance of the seeds of both sides to a difference over documents."""
    return stats.widen(stats.widen(found, base.of_seeds), row.of_seeds)


def bits_over_bytes(row: Row, task: str, base: Row | None = None) -> Ratio | None:
    """Return the mean seed's bits of each right choice or whole document, less another row's, over its bytes.

    None where any were not kept.
    """
    own, other = row.bits(task), base.bits(task) if base else None
    if own is None or (base and other is None):
        return None
    less = other.tops.mean(0) if other else 0.0
    return Ratio(own.tops.mean(0) - less, own.bottoms[0], row.clusters(task))


def per_byte(row: Row, task: str, base: Row | None = None) -> Estimate | None:
    """Estimate bits per byte of a task's whole documents, less those of another row; over documents and seeds."""
    ratio = bits_over_bytes(row, task, base)
    if ratio is None:
        return None
    found = stats.average_ratio({task: ratio})
    for one in (row, base):
        seeds = one.bits(task) if one else None
        found = stats.widen(found, seeds.of_seeds) if seeds else found
    return found


def differs(estimate: Estimate | None) -> bool:
    """Tell whether an interval of a difference leaves out 0."""
    return estimate is not None and (estimate.low > 0 or estimate.high < 0)


@dataclass(frozen=True)
class Judged:
    """A comparison as one of several: its verdict after Holm's correction."""

    found: Found
    p_holm: float
    family: int
    """Comparisons that it was corrected for."""
    unit: ScoreUnit = "points"

    @property
    def lost(self) -> bool:
        """Tell whether only the correction keeps it from being a difference."""
        return self.found.verdict in ("better", "worse") and self.p_holm >= SIGNIFICANT

    @property
    def verdict(self) -> str:
        """better, worse, equivalent or cannot tell."""
        return "cannot tell" if self.lost else self.found.verdict

    @property
    def words(self) -> str:
        """The verdict as a clause."""
        if not self.lost:
            return self.found.words
        return (
            f"cannot tell: {SAID[self.unit].signed(self.found.difference.value)} would be a difference alone (p = "
            f"{self.found.p:.3f}), not as one of {self.family} comparisons (Holm's p = {self.p_holm:.3f})"
        )


def judge(family: dict[tuple[str, ...], Found | None], unit: ScoreUnit = "points") -> dict[tuple[str, ...], Judged]:
    """Correct a family of comparisons for being several. unit: what differences are said in."""
    known = {key: found for key, found in family.items() if found is not None}
    keys = {"\x1f".join(key): key for key in known}
    adjusted = stats.holm({text: known[key].p for text, key in keys.items()})
    return {key: Judged(known[key], adjusted[text], len(known), unit) for text, key in keys.items()}
