"""Several seeds of one setting on the same items (layer 1).

Two-way random effects: answer(seed, item) = μ + seed + item + residual. The benchmark's items and the seeds are both
samples, so Var(mean) = σ²_seed/S + σ²_item/N + σ²_residual/(S·N) (Miller 2024 and Madaan et al. 2024, "Quantifying
variance in evaluation benchmarks", separate the same parts; mean squares as in Searle, Casella & McCulloch 1992).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from kdctl.errors import DataError
from kdctl.findings import SeedComparison, SeedSpread
from kdctl.records import Estimate
from kdctl.stats.bootstrap import LEVEL
from kdctl.stats.groups import Array, Labels, correctness, covariance, finite, grouping, quantile
from kdctl.stats.verdicts import EQUIVALENCE_LEVEL, MARGIN, decide, detectable, p_value, require_margin


@dataclass(frozen=True)
class _MeanSquares:
    """Mean squares of seeds, items and residual of one (S, N) matrix; only with S, N > 1."""

    seed: float
    item: float
    residual: float


def _matrix(values: ArrayLike, name: str) -> Array:
    """Return answers as (seeds, items) numbers; DataError on another shape."""
    answers = correctness(values, name).astype(np.float64)
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


def _seed_parts(answers: Array) -> list[_Part]:
    """Return σ²_seed/S, 0 where its estimate is negative; nothing with one seed, which leaves it unknown."""
    squares = _mean_squares(answers)
    if squares is None:
        return []
    return [_Part(max(0.0, squares.seed - squares.residual) / answers.size, len(answers) - 1)]


def _item_part(means: Array, clusters: Labels | None, least: float) -> _Part:
    """Return the variance of the mean of items' means (N,), clustered, which holds σ²_item/N and σ²_residual/(S·N).

    ``least`` is the latter: where the item part's estimate is negative, nothing is taken off it.
    """
    index = grouping(clusters, len(means))
    return _Part(max(float(covariance([means], index)[0, 0]), least), int(index.max()))


def _residual_part(answers: Array) -> float:
    squares = _mean_squares(answers)
    return 0.0 if squares is None else squares.residual / answers.size


def _interval(value: float, parts: list[_Part], items: int) -> Callable[[float], Estimate]:
    """Return the interval of a mean as a function of the level: √Σ (t·SE)², each part with its own t quantile.

    That is t with seeds − 1 where seeds make the error and nearly z where items do, as Cochran & Cox 1957 weigh the
    quantiles; Satterthwaite's degrees of freedom cover only 91 % with three seeds. It is never narrower than a score
    interval is where all answers are equal, z²/(items + z²): see ``proportions.tango``.
    """

    def at(level: float) -> Estimate:
        z = quantile(level, np.inf)
        half = z**2 / (items + z**2)
        if all(np.isfinite(part.variance) for part in parts):
            half = max(half, float(np.sqrt(sum(quantile(level, part.df) ** 2 * part.variance for part in parts))))
        else:
            half = 1.0
        return Estimate(value=value, low=max(-1.0, value - half), high=min(1.0, value + half))

    return at


def _variance(parts: list[_Part]) -> float:
    return sum(part.variance for part in parts)


def seeds(matrix: ArrayLike, clusters: Labels | None = None) -> SeedSpread:
    """Estimate the accuracy of a setting from (seeds, items) answers, and how much of its error each part makes.

    With one seed the part of the seeds is unknown and the interval is over items only. ``clusters`` widen it.
    Raises DataError on another shape and on a wrong number of labels.
    """
    answers = _matrix(matrix, "matrix")
    count, items = answers.shape
    squares = _mean_squares(answers)
    parts = [*_seed_parts(answers), _item_part(answers.mean(0), clusters, _residual_part(answers))]
    estimate = _interval(float(answers.mean()), parts, items)(LEVEL)
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


def compare_seeds(a: ArrayLike, b: ArrayLike, clusters: Labels | None = None, margin: float = MARGIN) -> SeedComparison:
    """Compare two settings, (seeds, items) each, on the same items; the difference is b − a.

    The two settings' seeds are independent, also where they bear the same numbers, and their items are paired:
    σ²_seed/S of each plus the clustered variance of the items' differences of means. A setting with one seed adds
    nothing for its seeds, which the words say.
    Raises DataError on unequal items, on other shapes, and on a margin outside (0, 1).
    """
    require_margin(margin)
    first, second = _matrix(a, "a"), _matrix(b, "b")
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"a has {first.shape[1]} items and b {second.shape[1]}, but only answers to the same items can be paired. "
            "Compare the items that both have, in the same order."
        )
    means, items = second.mean(0) - first.mean(0), first.shape[1]
    least = _residual_part(first) + _residual_part(second)
    parts = [*_seed_parts(first), *_seed_parts(second), _item_part(means, clusters, least)]
    interval = _interval(float(means.mean()), parts, items)
    difference, inner, p = interval(LEVEL), interval(EQUIVALENCE_LEVEL), p_value(interval)
    verdict, words = decide(difference, inner, p, margin)
    spreads = (seeds(first), seeds(second))
    unknown = any(spread.seed_variance is None for spread in spreads)
    return SeedComparison(
        difference=difference,
        standard_error=finite(_variance(parts)),
        p=p,
        margin=margin,
        mde=detectable(difference),
        items=items,
        verdict=verdict,
        words=words + ("; one seed does not show how much other seeds differ" if unknown else ""),
        seeds=(len(first), len(second)),
        seed_variances=(spreads[0].seed_variance, spreads[1].seed_variance),
    )
