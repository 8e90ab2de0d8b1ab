"""Items that come in groups: what they say less than as many independent items."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from kdctl.base.errors import DataError

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Labels = Sequence[Hashable] | NDArray[np.generic]


def quantile(level: float, df: float) -> float:
    """Return the t quantile of a two-sided interval; df = ∞ is the normal one."""
    share = (1 + level) / 2
    return float(ndtri(share) if np.isinf(df) else stdtrit(df, share))


def number(labels: Labels) -> Index:
    """Number groups in order of appearance, (items,)."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], np.int64)


def correctness(values: ArrayLike, name: str) -> NDArray[np.bool_]:
    """Return answers as booleans, (items,) or (seeds, items).

    Raises DataError where there are none or where they are neither right (1) nor wrong (0).
    """
    array = np.asarray(values)
    if not array.size or not np.isin(array, (0, 1)).all():
        raise DataError(
            f"{name} must hold at least one answer, each right (1) or wrong (0); its shape is {array.shape}. "
            "The formulas for accuracies hold for nothing else: use ratio_difference for other metrics."
        )
    return array.astype(bool)


def shares(values: ArrayLike, name: str) -> Array:
    """Return what answers are worth, (items,) or (seeds, items), on average from 0 (wrong) to 1 (right).

    Single ones may lie outside, as those that stand for several do. Raises DataError where there are none or where the
    average is beyond 1 or below 0 by more than chance can explain.
    """
    array = np.asarray(values, np.float64)
    spread = array.std() / np.sqrt(max(1, array.shape[-1])) if array.size else 0.0
    if not array.size or not -6 * spread <= array.mean() <= 1 + 6 * spread:
        raise DataError(
            f"{name} must hold at least one answer, each worth 0 (wrong) to 1 (right); its shape is {array.shape}. "
            "Averages of accuracies hold for nothing else: use ratio_difference for other metrics."
        )
    return array


def grouping(clusters: Labels | None, items: int) -> Index:
    """Number the items' groups, each item its own without ``clusters``; DataError where counts differ."""
    if clusters is None:
        return np.arange(items)
    if len(clusters) != items:
        raise DataError(
            f"{len(clusters)} cluster labels came with {items} items, so it is unknown which item belongs where. "
            "Give one label an item."
        )
    return number(clusters)


def influences(values: ArrayLike, index: Index, groups: int) -> Array:
    """Sum by group what each item adds to the mean's error, (v − mean) / items; returns (groups,)."""
    array = np.asarray(values, np.float64)
    return np.bincount(index, (array - array.mean()) / len(array), groups).astype(np.float64)


def covariance(columns: Sequence[ArrayLike], index: Index) -> Array:
    """Estimate the covariance of the means of K columns of (items,) that come in groups; returns (K, K).

    Σ over groups of products of summed deviations / items², times G/(G−1), which is what statsmodels gives for a
    regression on a constant with clustered covariance (Liang & Zeger 1986). Miller 2024, "Adding error bars to evals",
    leaves the factor out of the clustered standard error; it matters with few groups, and with groups of one item it
    makes the result s²/n. ∞ with one group.
    """
    groups = int(index.max()) + 1
    if groups == 1:
        return np.full((len(columns), len(columns)), np.inf)
    table = np.stack([influences(column, index, groups) for column in columns])
    return table @ table.T * groups / (groups - 1)


@dataclass(frozen=True)
class Design:
    """How items were drawn, for one column of values."""

    groups: int
    variance: float
    """Of the mean."""
    effect: float
    """Variance over that of as many independent items (Kish 1965), taken as at least 1; ∞ with one group."""
    df: float
    """Degrees of freedom of the variance; ∞ for independent items, whose score intervals are normal ones."""


def design(values: ArrayLike, clusters: Labels | None) -> Design:
    """Measure how much less the items say because they come in groups."""
    array = np.asarray(values, np.float64)
    index = grouping(clusters, len(array))
    variance = float(covariance([array], index)[0, 0])
    groups = int(index.max()) + 1
    if clusters is None:
        return Design(groups, variance, 1.0, np.inf)
    if groups == 1:
        return Design(groups, variance, np.inf, 0.0)
    independent = float(covariance([array], np.arange(len(array)))[0, 0])
    return Design(groups, variance, max(1.0, variance / independent) if independent else 1.0, groups - 1.0)


def finite(variance: float) -> float | None:
    """Return the standard error, None where the variance is unknown (∞)."""
    return float(np.sqrt(variance)) if np.isfinite(variance) else None
