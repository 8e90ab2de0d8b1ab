"""Clustered covariances against statsmodels and closed forms; what is refused."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import norm, t

from kdctl.base.errors import DataError
from kdctl.stats.groups import correctness, covariance, design, grouping, number, quantile

RANDOM = np.random.default_rng(0)
VALUES = RANDOM.random(90)
LABELS = [f"subject {i}" for i in RANDOM.integers(0, 12, 90)]


def test_clustered_variance_is_that_of_a_regression_on_a_constant() -> None:
    """statsmodels multiplies by G/(G−1)·(n−1)/(n−1); without its correction the factor G/(G−1) is what differs."""
    groups = number(LABELS)
    model = sm.OLS(VALUES, np.ones(90))
    for corrected, factor in ((True, 1.0), (False, 12 / 11)):
        fit = model.fit(cov_type="cluster", cov_kwds={"groups": groups, "use_correction": corrected})
        assert covariance([VALUES], groups)[0, 0] == pytest.approx(factor * fit.bse[0] ** 2, rel=1e-12)


def test_variance_of_independent_items_is_that_of_a_mean() -> None:
    assert covariance([VALUES], np.arange(90))[0, 0] == pytest.approx(VALUES.var(ddof=1) / 90, rel=1e-12)


def test_miller_without_the_factor() -> None:
    groups = number(LABELS)
    deviation = VALUES - VALUES.mean()
    same = groups[:, None] == groups[None]
    expected = (deviation[:, None] * deviation[None] * same).sum() / 90**2
    assert covariance([VALUES], groups)[0, 0] == pytest.approx(12 / 11 * expected, rel=1e-12)


def test_covariance_of_two_columns_is_a_covariance_matrix() -> None:
    other = VALUES + RANDOM.random(90)
    both, total = covariance([VALUES, other], number(LABELS)), covariance([VALUES + other], number(LABELS))
    assert both.sum() == pytest.approx(total[0, 0], rel=1e-12)
    assert np.linalg.eigvalsh(both).min() > 0


def test_a_single_group_says_nothing() -> None:
    assert np.isinf(covariance([VALUES], np.zeros(90, np.int64))).all()
    drawn = design(VALUES, ["one"] * 90)
    assert (drawn.groups, drawn.df) == (1, 0)
    assert np.isinf(drawn.effect)


def test_design_effect_of_copies_is_their_number_and_never_below_one() -> None:
    copies = np.repeat(VALUES, 3)
    drawn = design(copies, np.repeat(np.arange(90), 3))
    assert drawn.effect == pytest.approx(3 * (270 - 1) / (270 - 3), rel=1e-12)
    assert drawn.df == 89
    opposite = np.tile([0.0, 1.0], 20)
    assert design(opposite, np.repeat(np.arange(20), 2)).effect == 1
    assert design(np.ones(20), np.repeat(np.arange(10), 2)).effect == 1
    assert (design(VALUES, None).effect, design(VALUES, None).df) == (1, np.inf)


def test_quantiles_are_normal_at_infinite_degrees_of_freedom() -> None:
    assert quantile(0.95, np.inf) == pytest.approx(norm.ppf(0.975), rel=1e-12)
    assert quantile(0.9, 7) == pytest.approx(t.ppf(0.95, 7), rel=1e-12)


def test_groups_are_numbered_by_equality_of_labels() -> None:
    assert number(["b", "a", "b", 3, "a"]).tolist() == [0, 1, 0, 2, 1]
    assert number(np.array(["b", "a", "b"])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("values", [[], [0.5, 1], [2, 0], [np.nan, 1]])
def test_answers_are_right_or_wrong(values: list) -> None:
    with pytest.raises(DataError, match="must hold at least one answer, each right"):
        correctness(values, "a")


def test_labels_and_items_are_counted() -> None:
    with pytest.raises(DataError, match="2 cluster labels came with 3 items"):
        grouping(["a", "b"], 3)
