"""Several seeds of one setting on the same items.

Two-way random effects: answer(seed, item) = μ + seed + item + residual. The benchmark's items and the seeds are both
samples, so Var(mean) = σ²_seed/S + σ²_item/N + σ²_residual/(S·N) (Miller 2024 and Madaan et al. 2024, "Quantifying
variance in evaluation benchmarks", separate the same parts; mean squares as in Searle, Casella & McCulloch 1992).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from kdctl.base.errors import DataError
from kdctl.run.measures import ScoreUnit
from kdctl.run.records import Estimate
from kdctl.stats.averages import Task, averages, covariance, number_tasks, resolve_weights
from kdctl.stats.bootstrap import LEVEL
from kdctl.stats.findings import SeedComparison, SeedSpread
from kdctl.stats.groups import Array, Labels, finite, grouping, quantile, shares
from kdctl.stats.verdicts import EQUIVALENCE_LEVEL, MARGIN, decide, detectable, p_value, require_margin


@dataclass(frozen=True)
class _MeanSquares:
    """Mean squares of seeds, items and residual of one (S, N) matrix; only with S, N > 1."""

    seed: float
    item: float
    residual: float


def _matrix(values: ArrayLike, name: str) -> Array:
    """Return what answers are worth as (seeds, items) numbers in [0, 1]; DataError on others and on another shape."""
    answers = shares(values, name)
    if answers.ndim != 2:
        raise DataError(
            f"{name} has shape {answers.shape}, but seeds are compared on the same items: it must be (seeds, items). "
            "Put the answers of one seed in one row."
        )
    return answers


def _mean_squares(answers: Array) -> _MeanSquares | None:
    """Analyse the variance of (S, N) answers; None where one seed (or item) leaves its parts mixed."""
    seeds, items = answers.shape
    if seeds == 1 or items == 1:
        return None
    by_seed, by_item = answers.mean(1), answers.mean(0)
    residual = answers - by_seed[:, None] - by_item + answers.mean()
    return _MeanSquares(
        seed=items * float(by_seed.var(ddof=1)),
        item=seeds * float(by_item.var(ddof=1)),
        residual=float(np.square(residual).sum()) / ((seeds - 1) * (items - 1)),
    )


@dataclass(frozen=True)
class _Part:
    """An independent part of a mean's variance, and the degrees of freedom that it is known with."""

    variance: float
    df: float


@dataclass(frozen=True)
class _Setting:
    """Answers of one setting's seeds to one or several tasks, (seeds, items) each, and the tasks' weights."""

    answers: dict[str, Array]
    weights: dict[str, float]

    @property
    def by_seed(self) -> Array:
        """The average accuracy of each seed, (seeds,)."""
        return np.sum([self.weights[name] * answers.mean(1) for name, answers in self.answers.items()], axis=0)

    @property
    def binary(self) -> bool:
        """Tell whether all answers are right or wrong."""
        return all(bool(np.isin(answers, (0, 1)).all()) for answers in self.answers.values())

    @property
    def residual(self) -> float:
        """σ²_residual/(S·N), summed over tasks."""
        return sum(self.weights[name] ** 2 * _residual_part(answers) for name, answers in self.answers.items())

    def seed_parts(self) -> list[_Part]:
        """Return σ²_seed/S, 0 where its estimate is negative; nothing with one seed, which leaves it unknown."""
        count = len(self.by_seed)
        if count == 1:
            return []
        return [_Part(max(0.0, float(self.by_seed.var(ddof=1)) / count - self.residual), count - 1)]


def _residual_part(answers: Array) -> float:
    squares = _mean_squares(answers)
    return 0.0 if squares is None else squares.residual / answers.size


def _item_part(tasks: Sequence[Task], least: float) -> _Part:
    """Return the variance of the average of items' means, clustered, which holds σ²_item/N and σ²_residual/(S·N).

    ``least`` is the latter: where the item part's estimate is negative, nothing is taken off it.
    """
    groups = min(len(np.unique(task.groups)) for task in tasks)
    return _Part(max(float(covariance(tasks)[0, 0]), least), groups - 1)


def _tasks(
    means: Mapping[str, Array], clusters: Mapping[str, Labels | None], weights: Mapping[str, float]
) -> list[Task]:
    for name, values in means.items():
        grouping(clusters[name], len(values))
    numbers = number_tasks({name: (len(values), clusters[name]) for name, values in means.items()})
    return [Task(values[None], numbers[name], weights[name]) for name, values in means.items()]


def _interval(value: float, parts: list[_Part], tasks: Sequence[Task], binary: bool) -> Callable[[float], Estimate]:
    """Return the interval of a mean as a function of the level: √Σ (t·SE)², each part with its own t quantile.

    That is t with seeds − 1 where seeds make the error and nearly z where items do, as Cochran & Cox 1957 weigh the
    quantiles; Satterthwaite's degrees of freedom cover only 91 % with three seeds. Of answers that are right or wrong
    it is never narrower than a score interval is where all are equal, z²/(items + z²) of each task: see
    ``proportions.tango``.
    """

    def at(level: float) -> Estimate:
        z = quantile(level, np.inf)
        least = [task.weight * z**2 / (task.columns.shape[1] + z**2) for task in tasks]
        half = float(np.sqrt(sum(part**2 for part in least))) if binary else 0.0
        if all(np.isfinite(part.variance) for part in parts):
            half = max(half, float(np.sqrt(sum(quantile(level, part.df) ** 2 * part.variance for part in parts))))
        else:
            half = 1.0
        return Estimate(value=value, low=max(-1.0, value - half), high=min(1.0, value + half))

    return at


def _variance(parts: list[_Part]) -> float:
    return sum(part.variance for part in parts)


def _parts(setting: _Setting, clusters: Mapping[str, Labels | None]) -> tuple[list[_Part], list[Task]]:
    tasks = _tasks({name: answers.mean(0) for name, answers in setting.answers.items()}, clusters, setting.weights)
    return [*setting.seed_parts(), _item_part(tasks, setting.residual)], tasks


def seeds(matrix: ArrayLike, clusters: Labels | None = None) -> SeedSpread:
    """Estimate the accuracy of a setting from (seeds, items) answers, and how much of its error each part makes.

    With one seed the part of the seeds is unknown and the interval is over items only. ``clusters`` widen it.
    Raises DataError on another shape and on a wrong number of labels.
    """
    answers = _matrix(matrix, "matrix")
    count, items = answers.shape
    squares = _mean_squares(answers)
    setting = _Setting({"": answers}, {"": 1.0})
    parts, tasks = _parts(setting, {"": clusters})
    estimate = _interval(float(answers.mean()), parts, tasks, setting.binary)(LEVEL)
    raw: dict[Literal["seed", "item"], float] = {}
    if squares is not None:
        raw = {"seed": (squares.seed - squares.residual) / items, "item": (squares.item - squares.residual) / count}
    return SeedSpread(
        accuracy=Estimate(value=estimate.value, low=max(0.0, estimate.low), high=estimate.high),
        standard_error=finite(_variance(parts)),
        seeds=count,
        items=items,
        seed_variance=max(0.0, raw["seed"]) if raw else None,
        item_variance=max(0.0, raw["item"]) if raw else None,
        residual_variance=squares.residual if squares is not None else None,
        clipped=tuple(name for name, component in raw.items() if component < 0),
    )


def average_seeds(
    matrices: Mapping[str, ArrayLike],
    clusters: Mapping[str, Labels | None],
    weights: Mapping[str, float] | None = None,
) -> tuple[Estimate, float | None]:
    """Estimate the average over tasks of a setting's accuracies with its standard error, as ``seeds`` does one task.

    ``matrices`` are (seeds, items), the same seeds in the same order. The standard error is None where it is unknown.
    """
    setting = _Setting(
        {name: _matrix(values, name) for name, values in matrices.items()}, resolve_weights(list(matrices), weights)
    )
    parts, tasks = _parts(setting, clusters)
    return _interval(float(setting.by_seed.mean()), parts, tasks, setting.binary)(LEVEL), finite(_variance(parts))


@dataclass(frozen=True)
class Repeated:
    """Answers of two settings' seeds to the same items, (seeds, items) each; ``clusters`` as in ``Paired``.

    Raises DataError on other shapes and on unequal items.
    """

    a: ArrayLike
    b: ArrayLike
    clusters: Labels | None = None

    def __post_init__(self) -> None:
        """Refuse answers that cannot be paired."""
        first, second = _matrix(self.a, "a"), _matrix(self.b, "b")
        if first.shape[1] != second.shape[1]:
            raise DataError(
                f"a has {first.shape[1]} items and b {second.shape[1]}, but only answers to the same items can be "
                "paired. Compare the items that both have, in the same order."
            )


def compare_seeds(a: ArrayLike, b: ArrayLike, clusters: Labels | None = None, margin: float = MARGIN) -> SeedComparison:
    """Compare two settings, (seeds, items) each, on the same items; the difference is b − a.

    The two settings' seeds are independent, also where they bear the same numbers, and their items are paired:
    σ²_seed/S of each plus the clustered variance of the items' differences of means. A setting with one seed adds
    nothing for its seeds, which the words say.
    Raises DataError on unequal items, on other shapes, and on a margin outside (0, 1).
    """
    return compare_seeds_average({"": Repeated(a, b, clusters)}, margin=margin)


def compare_seeds_average(
    pairs: Mapping[str, Repeated],
    weights: Mapping[str, float] | None = None,
    margin: float = MARGIN,
    fixed: bool = False,
    b_fixed: bool = False,
    unit: ScoreUnit = "points",
) -> SeedComparison:
    """Compare two settings on the average of several tasks; every task has the same seeds in the same order.

    The seeds' part is the variance between the seeds' averages less what the items leave in it, so that a seed that is
    good at every task counts as one; the items' part is that of ``averages``. ``fixed``, ``b_fixed``: a or b is one
    model that no seed made, and its single row says nothing less. ``unit``: what answers are worth, for the words.
    Raises DataError as ``compare_seeds`` and ``compare_average`` do.
    """
    require_margin(margin)
    chosen = resolve_weights(list(pairs), weights)
    first = _Setting({name: _matrix(pair.a, "a") for name, pair in pairs.items()}, chosen)
    second = _Setting({name: _matrix(pair.b, "b") for name, pair in pairs.items()}, chosen)
    means = {name: second.answers[name].mean(0) - first.answers[name].mean(0) for name in pairs}
    tasks = _tasks(means, {name: pair.clusters for name, pair in pairs.items()}, chosen)
    parts = [*first.seed_parts(), *second.seed_parts(), _item_part(tasks, first.residual + second.residual)]
    interval = _interval(float(averages(tasks)[0]), parts, tasks, first.binary and second.binary)
    difference, inner, p = interval(LEVEL), interval(EQUIVALENCE_LEVEL), p_value(interval)
    verdict, words = decide(difference, inner, p, margin, unit)
    counts, variances = (len(first.by_seed), len(second.by_seed)), [_seed_variance(one) for one in (first, second)]
    unknown = (variances[1] is None and not b_fixed) or (variances[0] is None and not fixed)
    return SeedComparison(
        difference=difference,
        standard_error=finite(_variance(parts)),
        p=p,
        margin=margin,
        mde=detectable(difference),
        items=sum(len(values) for values in means.values()),
        verdict=verdict,
        words=words + ("; one seed does not show how much other seeds differ" if unknown else ""),
        seeds=counts,
        seed_variances=(variances[0], variances[1]),
    )


def _seed_variance(setting: _Setting) -> float | None:
    return next((part.variance * len(setting.by_seed) for part in setting.seed_parts()), None)


def widen(estimate: Estimate, values: Sequence[float]) -> Estimate:
    """Add the variance of the mean of several seeds' values to an interval over documents, as ``_interval`` adds parts.

    The seeds' variance holds a share of the documents' too, which makes the interval wider, not narrower. One seed adds
    nothing, because its variance is unknown.
    """
    if len(values) < 2:
        return estimate
    half = quantile(LEVEL, len(values) - 1) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    low = estimate.value - float(np.hypot(estimate.value - estimate.low, half))
    return Estimate(
        value=estimate.value, low=low, high=estimate.value + float(np.hypot(estimate.high - estimate.value, half))
    )
