"""How much of what quantization lost came back, in accuracy. For KL see ``bootstrap.removed``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kdctl.run.records import Estimate
from kdctl.stats import bootstrap
from kdctl.stats.averages import Task, averages, covariance, number_tasks, resample, resolve_weights
from kdctl.stats.bootstrap import LEVEL
from kdctl.stats.comparisons import Paired, compare_average
from kdctl.stats.findings import Comparison, Recovery
from kdctl.stats.groups import Array, Labels, design, quantile


def fieller(top: float, bottom: float, covariance: Array, z: float) -> tuple[float, float] | None:
    """Return the interval of top / bottom: the r where top − r·bottom is within z standard errors of 0 (Fieller 1954).

    ``covariance`` is (2, 2), of top and bottom. None where bottom is within z of 0: no interval.
    """
    square = bottom**2 - z**2 * covariance[1, 1]
    if not square > 0:
        return None
    middle = (top * bottom - z**2 * covariance[0, 1]) / square
    constant = (top**2 - z**2 * covariance[0, 0]) / square
    half = float(np.sqrt(max(middle**2 - constant, 0)))
    return float(middle - half), float(middle + half)


def _refusal(gap: Comparison, unbounded: bool) -> str | None:
    """Say why there is no share of a gap to speak of, or None where there is."""
    low, high = 100 * gap.difference.low, 100 * gap.difference.high
    if unbounded or gap.p >= 1 - LEVEL:
        return f"the gap between teacher and PTQ student is within noise ({low:+.2f} to {high:+.2f} points)"
    if gap.difference.value < 0:
        return f"the teacher is worse than the PTQ student ({low:+.2f} to {high:+.2f} points): nothing was lost"
    return None


@dataclass(frozen=True)
class Trio:
    """Answers of the student, the PTQ student and the teacher to the same items, as in ``Paired``."""

    student: ArrayLike
    ptq: ArrayLike
    teacher: ArrayLike
    clusters: Labels | None = None

    @property
    def gain(self) -> Paired:
        """Return the student against the PTQ student."""
        return Paired(self.ptq, self.student, self.clusters)

    @property
    def gap(self) -> Paired:
        """Return the teacher against the PTQ student."""
        return Paired(self.ptq, self.teacher, self.clusters)


def _tasks(trios: Mapping[str, Trio], weights: Mapping[str, float]) -> list[Task]:
    columns = {name: np.stack([trio.gain.difference, trio.gap.difference]) for name, trio in trios.items()}
    numbers = number_tasks({name: (columns[name].shape[1], trio.clusters) for name, trio in trios.items()})
    return [Task(columns[name], numbers[name], weights[name]) for name in trios]


def _recovery(tasks: Sequence[Task], gap: Comparison, df: float) -> Recovery:
    top, bottom = averages(tasks)
    bounds = fieller(float(top), float(bottom), covariance(tasks), quantile(LEVEL, df))
    reason = _refusal(gap, bounds is None)
    if bounds is None or reason is not None:
        return Recovery(estimate=None, bootstrap=None, reason=reason, gap=gap)
    estimate = Estimate(value=float(top / bottom), low=bounds[0], high=bounds[1])
    tops, bottoms = resample(tasks)
    resampled = bootstrap.percentile(estimate.value, tops / bottoms) if (bottoms > 0).all() else None
    return Recovery(estimate=estimate, bootstrap=resampled, reason=None, gap=gap)


def recovery(student: ArrayLike, ptq: ArrayLike, teacher: ArrayLike, clusters: Labels | None = None) -> Recovery:
    """Estimate (student − PTQ) / (teacher − PTQ) on the same items, (items,) answers each.

    No number where the gap below the line is within noise: a share of it would be anything. The interval takes the
    (clustered) covariance of the two paired differences, with the t quantile at groups − 1 where there are clusters.
    Raises DataError as ``Paired`` does.
    """
    return recovery_average({"": Trio(student, ptq, teacher, clusters)})


def recovery_average(trios: Mapping[str, Trio], weights: Mapping[str, float] | None = None) -> Recovery:
    """Estimate the same share of accuracies averaged over tasks, as ``compare_average`` averages them.

    The t quantile is that of the task with the fewest groups. Raises DataError as ``compare_average`` does.
    """
    chosen = resolve_weights(list(trios), weights)
    gaps = {name: trio.gap for name, trio in trios.items()}
    gap = compare_average(gaps, weights=chosen)
    df = min(design(pair.difference, pair.clusters).df for pair in gaps.values())
    return _recovery(_tasks(trios, chosen), gap, df)
