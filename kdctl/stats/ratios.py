"""Averages over tasks of ratios of sums, such as bits per byte."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kdctl.base.errors import DataError
from kdctl.run.records import Estimate
from kdctl.stats.averages import Task, covariance, number_tasks, resolve_weights
from kdctl.stats.bootstrap import LEVEL
from kdctl.stats.groups import Labels, grouping, quantile


@dataclass(frozen=True)
class Ratio:
    """Sums of a task's items and what they are divided by, (items,) each; ``clusters`` as in ``Paired``.

    Raises DataError where counts differ or nothing is divided by.
    """

    tops: ArrayLike
    bottoms: ArrayLike
    clusters: Labels | None = None

    def __post_init__(self) -> None:
        """Refuse what is no ratio."""
        tops, bottoms = np.asarray(self.tops, np.float64), np.asarray(self.bottoms, np.float64)
        if tops.shape != bottoms.shape or tops.ndim != 1 or not bottoms.sum() > 0:
            raise DataError(
                f"a ratio needs (items,) of sums and as many sizes above 0, not {tops.shape}, {bottoms.shape}"
            )
        grouping(self.clusters, len(tops))

    @property
    def value(self) -> float:
        """Σ tops / Σ bottoms."""
        return float(np.sum(self.tops) / np.sum(self.bottoms))

    @property
    def linear(self) -> np.ndarray:
        """Return one number an item whose mean is the ratio and whose mean's variance is the ratio's (delta method)."""
        bottoms = np.asarray(self.bottoms, np.float64)
        return self.value + (np.asarray(self.tops, np.float64) - self.value * bottoms) / bottoms.mean()


def average_ratio(ratios: Mapping[str, Ratio]) -> Estimate:
    """Average ratios over tasks with a 95 % interval over their items, clustered; of paired items, give differences.

    The t quantile is that of the task with the fewest groups. Raises DataError on no task.
    """
    weights = resolve_weights(list(ratios), None)
    numbers = number_tasks({name: (np.size(one.tops), one.clusters) for name, one in ratios.items()})
    tasks = [Task(one.linear[None], numbers[name], weights[name]) for name, one in ratios.items()]
    value = float(np.mean([one.value for one in ratios.values()]))
    df = min(len(np.unique(task.groups)) for task in tasks) - 1
    half = quantile(LEVEL, df) * float(np.sqrt(covariance(tasks)[0, 0])) if df > 0 else np.inf
    return Estimate(value=value, low=value - half, high=value + half)
