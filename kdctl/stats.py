"""Intervals for paired measurements on the same documents. Pure numpy (layer 1)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdctl.keyed import digest
from kdctl.records import Estimate

RESAMPLES = 2000
LEVEL = 0.95
Array = NDArray[np.float64]


def _resamples(documents: int) -> NDArray[np.int64]:
    """Draw the document indices of all bootstrap resamples, (RESAMPLES, documents); equal for equal counts."""
    generator = np.random.Generator(np.random.Philox(key=digest("bootstrap", documents)))
    return generator.integers(0, documents, (RESAMPLES, documents))


def _estimate(value: float, resampled: Array) -> Estimate:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=float(value), low=float(low), high=float(high))


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Estimate Σ numerators / Σ denominators with a percentile bootstrap over documents (Efron 1979).

    Both are (documents,); per-token means are ratios because documents differ in length.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    index = _resamples(len(top))
    return _estimate(top.sum() / bottom.sum(), top[index].sum(-1) / bottom[index].sum(-1))


def removed(after: ArrayLike, before: ArrayLike) -> Estimate:
    """Estimate 1 − Σ after / Σ before on the same documents, resampling them in pairs."""
    left = ratio(after, before)
    return Estimate(value=1 - left.value, low=1 - left.high, high=1 - left.low)


def exponential(estimate: Estimate) -> Estimate:
    """Map an estimate of a mean negative log-likelihood to perplexity."""
    return Estimate(**{name: float(np.exp(value)) for name, value in estimate.model_dump().items()})
