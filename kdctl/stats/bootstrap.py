"""Percentile bootstrap over documents or groups of items, the same every time."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdctl.base.errors import DataError
from kdctl.base.rng import digest
from kdctl.run.records import Estimate

RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 2**20
Array = NDArray[np.float64]


def _generator(documents: int, *key: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=digest("bootstrap", documents, *key)))


def resampled_sums(rows: Sequence[ArrayLike]) -> Array:
    """Sum each row over every bootstrap resample of its entries, resampling all rows together.

    ``rows`` are K rows of (documents,); returns (K, RESAMPLES), the same documents for equal counts of them.
    """
    table = np.asarray(rows, np.float64)
    documents = table.shape[1]
    generator = _generator(documents)
    at_once = max(1, CHUNK // documents)
    draws = (
        generator.integers(0, documents, (min(at_once, RESAMPLES - start), documents))
        for start in range(0, RESAMPLES, at_once)
    )
    return np.concatenate([[row[index].sum(-1) for row in table] for index in draws], axis=1)


def resampled_counts(table: Array, *key: str) -> Array:
    """Sum each row of (K, groups) over every bootstrap resample of its columns, (K, RESAMPLES).

    Columns that are equal are drawn by their number at once, which is the same distribution and, for answers that are
    right or wrong, a thousand times less work. Strata that must be independent need a ``key`` of their own.
    """
    distinct, counts = np.unique(table, axis=1, return_counts=True)
    groups = table.shape[1]
    return distinct @ _generator(groups, *key).multinomial(groups, counts / groups, RESAMPLES).T


def percentile(value: float, resampled: Array) -> Estimate:
    """Put the percentile interval of resampled values around a value (Efron 1979).

    Resamples of which nothing can be said, as 0 / 0, are left out; one of ∞ is between no two others.
    """
    known = resampled[~np.isnan(resampled)]
    if not known.size:
        return Estimate(value=float(value), low=-np.inf, high=np.inf)
    method = "linear" if np.isfinite(known).all() else "inverted_cdf"
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method=method)
    return Estimate(value=float(value), low=float(low), high=float(high))


def _of_sums(rows: Sequence[ArrayLike], statistic: Callable[[Array], Array]) -> Estimate:
    """Estimate a function of the rows' sums; ``statistic`` maps (K, ...) to (...)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return percentile(float(statistic(np.asarray(rows, np.float64).sum(-1))), statistic(resampled_sums(rows)))


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Estimate Σ numerators / Σ denominators with a percentile bootstrap over documents (Efron 1979).

    Both are (documents,); per-token means are ratios because documents differ in length.
    """
    return _of_sums([numerators, denominators], lambda sums: sums[0] / sums[1])


def ratio_difference(
    before: ArrayLike, after: ArrayLike, denominators: ArrayLike, after_denominators: ArrayLike | None = None
) -> Estimate:
    """Estimate Σ after / Σ denominators − Σ before / Σ denominators, resampling documents in pairs.

    All are (documents,), for example summed log-likelihoods or KL of two models and the documents' tokens;
    ``after_denominators`` only where the two models counted differently.
    """
    counts = denominators if after_denominators is None else after_denominators
    return _of_sums([before, denominators, after, counts], lambda sums: sums[2] / sums[3] - sums[0] / sums[1])


def removed(after: ArrayLike, before: ArrayLike) -> Estimate:
    """Estimate 1 − Σ after / Σ before on the same documents, resampling them in pairs.

    Raises DataError where Σ before is not above 0: there is no share of nothing.
    """
    if not np.sum(before) > 0:
        raise DataError("nothing was lost that a share of could be removed: the sum before is not above 0")
    left = ratio(after, before)
    return Estimate(value=1 - left.value, low=1 - left.high, high=1 - left.low)


def exponential(estimate: Estimate) -> Estimate:
    """Map an estimate of a mean negative log-likelihood to perplexity, ∞ beyond float64."""
    with np.errstate(over="ignore"):
        return Estimate(**{name: float(np.exp(value)) for name, value in estimate.model_dump().items()})
