"""Score intervals of one accuracy and of a paired difference of two.

Score intervals hold where few items or few flips make the normal ones too narrow: they have width even where all
answers are equal. Groups of items enter as an effective sample size (Rao & Scott 1992): counts divided by the design
effect.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import root_scalar

from kdctl.run.records import Estimate
from kdctl.stats.bootstrap import LEVEL
from kdctl.stats.findings import Accuracy
from kdctl.stats.groups import Labels, correctness, design, finite, quantile

BESIDE = 1e-12


def wilson(right: float, items: float, z: float) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927); counts need not be whole."""
    centre = (right + z**2 / 2) / (items + z**2)
    half = z / (items + z**2) * np.sqrt(max(right * (items - right), 0) / items + z**2 / 4)
    return float(centre - half), float(centre + half)


def accuracy(correct: ArrayLike, clusters: Labels | None = None) -> Accuracy:
    """Estimate an accuracy with its (clustered) standard error and a Wilson interval; ``correct`` is (items,).

    ``clusters`` names each item's group: MMLU subject, WinoGrande twin. Standard error: ``groups.covariance``. The
    interval takes the effective counts and, with clusters, the t quantile at groups − 1 (Korn & Graubard 1998).
    Raises DataError on answers that are neither right nor wrong and on a wrong number of labels.
    """
    answers = correctness(correct, "correct")
    drawn = design(answers, clusters)
    value, low, high = float(answers.mean()), 0.0, 1.0
    if np.isfinite(drawn.effect):
        items = len(answers) / drawn.effect
        low, high = wilson(value * items, items, quantile(LEVEL, drawn.df))
    # All right or all wrong, the bound is the value itself but for rounding.
    estimate = Estimate(value=value, low=min(value, max(0.0, low)), high=max(value, min(1.0, high)))
    standard_error = finite(drawn.variance)
    return Accuracy(estimate=estimate, standard_error=standard_error, items=len(answers), groups=drawn.groups)


def _excess(beneficial: float, harmful: float, items: float, z: float) -> Callable[[float], float]:
    """Return Tango's (score² − z²)·variance as a function of the difference: positive outside the interval."""

    def excess(difference: float) -> float:
        linear = (2 * items - beneficial + harmful) * difference - beneficial - harmful
        constant = -harmful * difference * (1 - difference)
        harm = (np.sqrt(max(linear**2 - 8 * items * constant, 0)) - linear) / (4 * items)
        variance = items * (2 * harm + difference * (1 - difference))
        return (beneficial - harmful - items * difference) ** 2 - z**2 * variance

    return excess


def tango(beneficial: float, harmful: float, items: float, z: float) -> tuple[float, float]:
    """Return the score interval of the paired difference (beneficial − harmful) / items.

    Tango 1998, Statistics in Medicine 17:891-908: the differences that a score test with the constrained
    maximum-likelihood estimate of the harmful share does not reject. At difference 0 that is McNemar's test;
    with no flips at all the bounds are ±z²/(items + z²). Counts need not be whole.
    """
    excess = _excess(beneficial, harmful, items, z)
    value = (beneficial - harmful) / items
    # At the estimate itself the excess is 0 where no item flipped, so roots are sought just beside it.
    low = root_scalar(excess, bracket=(-1.0, value - BESIDE)).root if value - BESIDE > -1 else -1.0
    high = root_scalar(excess, bracket=(value + BESIDE, 1.0)).root if value + BESIDE < 1 else 1.0
    return float(low), float(high)
