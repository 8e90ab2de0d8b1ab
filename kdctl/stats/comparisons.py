"""Two models on the same items: one task, the average of several, several comparisons at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from kdctl.base.errors import DataError
from kdctl.run.records import Estimate
from kdctl.stats import bootstrap
from kdctl.stats.averages import Task, averages, correlation, covariance, number_tasks, resample, resolve_weights
from kdctl.stats.bootstrap import LEVEL
from kdctl.stats.findings import Comparison
from kdctl.stats.groups import Array, Design, Labels, correctness, design, finite, grouping, quantile
from kdctl.stats.proportions import tango
from kdctl.stats.verdicts import EQUIVALENCE_LEVEL, MARGIN, decide, detectable, p_value, require_margin


@dataclass(frozen=True)
class Paired:
    """Answers of models a and b to the same items, (items,) of right (1) or wrong (0), in the same order.

    ``clusters`` names the group of each item. In an average of tasks, items that bear equal labels in two tasks are one
    group, so put the task's name into labels that mean something within it only; where tasks share items, the label is
    the item's id. Raises DataError on other answers and on unequal counts.
    """

    a: ArrayLike
    b: ArrayLike
    clusters: Labels | None = None

    def __post_init__(self) -> None:
        """Refuse answers that are no pairs."""
        a, b = correctness(self.a, "a"), correctness(self.b, "b")
        if a.ndim != 1 or a.shape != b.shape:
            raise DataError(
                f"a has shape {a.shape} and b {b.shape}, but a paired comparison needs one answer of each an item. "
                "Compare the items that both have, in the same order."
            )
        grouping(self.clusters, len(a))

    @property
    def difference(self) -> Array:
        """Return b − a by item, (items,) of −1, 0 and 1."""
        return correctness(self.b, "b").astype(np.float64) - correctness(self.a, "a")


def _bounds(task: Task, drawn: Design, level: float) -> tuple[float, float]:
    """Return the score interval of a task's mean difference, on effective counts."""
    if not np.isfinite(drawn.effect):
        return -1.0, 1.0
    (difference,) = task.columns
    beneficial, harmful, items = (
        np.array([(difference > 0).sum(), (difference < 0).sum(), len(difference)]) / drawn.effect
    )
    return tango(float(beneficial), float(harmful), float(items), quantile(level, drawn.df))


def _interval(tasks: Sequence[Task], designs: Sequence[Design]) -> Callable[[float], Estimate]:
    """Return the interval of the average as a function of the level.

    Each task's score bounds stand for its variance near that bound (MOVER; Zou & Donner 2008, Statistics in Medicine
    27:1693-1702), with the correlations of the tasks; of one task it is its score interval.
    """
    value, related = float(averages(tasks)[0]), correlation(tasks)

    def at(level: float) -> Estimate:
        bounds = [_bounds(task, drawn, level) for task, drawn in zip(tasks, designs, strict=True)]
        means = [task.columns[0].mean() for task in tasks]
        reach = (np.array(bounds) - np.array(means)[:, None]) * np.array([[task.weight] for task in tasks])  # (K, 2)
        low, high = np.sqrt(np.maximum(np.einsum("ks,kl,ls->s", reach, related, reach), 0))
        return Estimate(value=value, low=max(-1.0, value - float(low)), high=min(1.0, value + float(high)))

    return at


def _mcnemar(beneficial: int, harmful: int) -> float:
    """Return the two-sided exact p of McNemar's test: were flips as likely either way, they would be coin tosses."""
    flips = beneficial + harmful
    return min(1.0, 2 * float(bdtr(min(beneficial, harmful), flips, 0.5)))


def _comparison(pairs: Mapping[str, Paired], weights: Mapping[str, float], margin: float) -> Comparison:
    require_margin(margin)
    designs = [design(pair.difference, pair.clusters) for pair in pairs.values()]
    numbers = number_tasks({name: (len(pair.difference), pair.clusters) for name, pair in pairs.items()})
    tasks = [Task(pair.difference[None], numbers[name], weights[name]) for name, pair in pairs.items()]
    interval = _interval(tasks, designs)
    difference, inner = interval(LEVEL), interval(EQUIVALENCE_LEVEL)
    flips = np.concatenate([task.columns[0] for task in tasks])
    beneficial, harmful = int((flips > 0).sum()), int((flips < 0).sum())
    exact, score = _mcnemar(beneficial, harmful), p_value(interval)
    # The score test is asymptotic; the exact one keeps a handful of flips that all go one way from being a finding.
    p = max(score, exact) if len(tasks) == 1 else score
    verdict, words = decide(difference, inner, p, margin)
    return Comparison(
        difference=difference,
        standard_error=finite(float(covariance(tasks)[0, 0])),
        p=p,
        margin=margin,
        mde=detectable(difference),
        items=len(flips),
        verdict=verdict,
        words=words,
        bootstrap=bootstrap.percentile(difference.value, resample(tasks)[0]),
        p_mcnemar=exact,
        harmful=harmful,
        beneficial=beneficial,
        flip_rate=(harmful + beneficial) / len(flips),
        groups=len(np.unique(np.concatenate([task.groups for task in tasks]))),
    )


def compare(pair: Paired, margin: float = MARGIN) -> Comparison:
    """Compare two models on the items of one task; differences are b − a.

    Interval and p: Tango's score interval on effective counts (``proportions``), p no smaller than the exact McNemar
    test's (McNemar 1947); standard error: paired and clustered (Miller 2024); verdict: ``verdicts.decide``.
    Raises DataError on a margin outside (0, 1).
    """
    return _comparison({"": pair}, {"": 1.0}, margin)


def compare_average(
    pairs: Mapping[str, Paired], margin: float = MARGIN, weights: Mapping[str, float] | None = None
) -> Comparison:
    """Compare two models on the average of their accuracies over tasks, unweighted or with weights that sum to 1.

    Tasks are fixed and their items are samples: Σ w² of the tasks' variances plus the covariances of tasks that share
    items or groups (``averages``). Flips and McNemar's p are those of all items pooled.
    Raises DataError on no task, on weights for other tasks or that do not sum to 1, and on a margin outside (0, 1).
    """
    return _comparison(pairs, resolve_weights(list(pairs), weights), margin)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for being several (Holm 1979); each is to be held against 5 % as if it were alone."""
    # A report corrects dozens of families; statsmodels, which the tests compare with, collects garbage in each call.
    values = np.array(list(p_values.values()))
    order = np.argsort(values)
    adjusted = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1.0)
    return {name: float(adjusted[rank]) for name, rank in zip(p_values, np.argsort(order), strict=True)}
