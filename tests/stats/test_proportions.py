"""Score intervals against statsmodels, published tables, a likelihood maximized by search, and their coverage."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar, root_scalar
from scipy.stats import binom, norm
from statsmodels.stats.proportion import proportion_confint

from kdctl.stats import accuracy
from kdctl.stats.proportions import tango, wilson

Z = float(norm.ppf(0.975))


@pytest.mark.parametrize(("right", "items"), [(0, 10), (10, 10), (3, 10), (712, 1000), (37.5, 61.25)])
def test_wilson_is_statsmodels(right: float, items: float) -> None:
    assert wilson(right, items, Z) == pytest.approx(proportion_confint(right, items, method="wilson"), abs=1e-12)


@pytest.mark.parametrize(
    ("beneficial", "harmful", "items", "published"),
    [
        (1, 7, 21, (-0.5172, -0.0260)),  # Bentur et al. 2009 in Fagerland, Lydersen & Laake 2014, section 8
        (6, 16, 161, (-0.1240, -0.0054)),  # Cavo et al. 2012 in Fagerland, Lydersen & Laake 2017, chapter 8
    ],
)
def test_tango_is_the_published_interval(
    beneficial: int, harmful: int, items: int, published: tuple[float, float]
) -> None:
    assert tango(beneficial, harmful, items, Z) == pytest.approx(published, abs=6e-5)


def searched(beneficial: int, harmful: int, items: int) -> tuple[float, float]:
    """Invert the score test with the harmful share found by maximizing the trinomial likelihood numerically."""

    def score(difference: float) -> float:
        def loss(harm: float) -> float:
            shares = np.array([harm + difference, harm, 1 - 2 * harm - difference])
            return -float(np.array([beneficial, harmful, items - beneficial - harmful]) @ np.log(shares))

        ends = (max(0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12)
        harm = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
        return (beneficial - harmful - items * difference) / np.sqrt(items * (2 * harm + difference - difference**2))

    value = (beneficial - harmful) / items
    low = root_scalar(lambda at: score(at) - Z, bracket=(-0.99, value - 1e-6))
    high = root_scalar(lambda at: score(at) + Z, bracket=(value + 1e-6, 0.99))
    return low.root, high.root


@pytest.mark.parametrize("counts", [(40, 20, 160), (3, 1, 50), (10, 12, 300), (1, 9, 12)])
def test_tango_inverts_the_score_test(counts: tuple[int, int, int]) -> None:
    assert tango(*counts, Z) == pytest.approx(searched(*counts), abs=1e-7)


def test_tango_without_flips_is_a_wilson_bound_and_with_all_of_one_kind_ends_at_one() -> None:
    for items in (5, 30, 10_000):
        bound = Z**2 / (items + Z**2)
        assert tango(0, 0, items, Z) == pytest.approx((-bound, bound), rel=1e-6)
    assert tango(5, 0, 5, Z)[1] == 1
    assert tango(0, 5, 5, Z)[0] == -1


def test_tango_turns_round_with_the_models() -> None:
    low, high = tango(12, 5, 100, Z)
    assert tango(5, 12, 100, Z) == pytest.approx((-high, -low), abs=1e-9)


def test_tango_at_zero_is_mcnemar() -> None:
    z = (30 - 17) / np.sqrt(30 + 17)
    assert tango(30, 17, 200, z)[0] == pytest.approx(0, abs=1e-9)


def tables(items: int, up: float, down: float) -> list[tuple[int, int, float]]:
    """List beneficial and harmful counts with their exact probabilities, but for a ten-thousandth of it."""
    found = []
    for flips in range(int(binom.ppf(1 - 1e-4, items, up + down)) + 1):
        for beneficial in range(flips + 1):
            share = binom.pmf(flips, items, up + down) * binom.pmf(beneficial, flips, up / (up + down))
            found.append((beneficial, flips - beneficial, float(share)))
    return found


@pytest.mark.parametrize(("items", "up", "down"), [(60, 0.03, 0.01), (100, 0.03, 0.01), (30, 0.05, 1e-4)])
def test_tango_covers_the_truth_where_the_normal_interval_does_not(items: int, up: float, down: float) -> None:
    score = normal = 0.0
    for beneficial, harmful, share in tables(items, up, down):
        low, high = tango(beneficial, harmful, items, Z)
        score += share * (low <= up - down <= high)
        value = (beneficial - harmful) / items
        half = Z * np.sqrt((beneficial + harmful) / items - value**2) / np.sqrt(items)
        normal += share * (abs(value - (up - down)) <= half)
    assert score >= 0.949
    assert normal < 0.94


@pytest.mark.parametrize(("items", "up", "down"), [(600, 0.005, 1e-9), (800, 0.005, 1e-9), (1500, 0.006, 0.001)])
def test_two_differences_of_the_margin_are_called_equivalent_in_5_of_100(items: int, up: float, down: float) -> None:
    z = float(norm.ppf(0.95))
    size = 0.0
    for beneficial, harmful, share in tables(items, up, down):
        low, high = tango(beneficial, harmful, items, z)
        size += share * (low > -0.005 and high < 0.005)
    assert 0.01 < size <= 0.05


def test_accuracy_has_its_standard_error_and_wilson_interval() -> None:
    found = accuracy([1, 1, 1, 0])
    assert found.estimate.value == 0.75
    assert found.standard_error == pytest.approx(np.sqrt(0.75 * 0.25 / 3))
    assert (found.estimate.low, found.estimate.high) == pytest.approx(proportion_confint(3, 4, method="wilson"))
    assert (found.items, found.groups) == (4, 4)


def test_accuracy_of_one_group_is_unknown() -> None:
    found = accuracy([1, 0, 1], ["only"] * 3)
    assert (found.estimate.low, found.estimate.high, found.standard_error) == (0, 1, None)


def test_accuracy_of_all_right_is_not_certain() -> None:
    found = accuracy([True] * 30)
    assert found.estimate.high == 1
    assert found.estimate.low == pytest.approx(30 / (30 + Z**2))


def test_clustered_accuracy_covers_and_the_unclustered_one_does_not() -> None:
    random = np.random.default_rng(5)
    hits = np.zeros(2)
    for _ in range(200):
        share = random.beta(3, 1, 30)  # subjects differ; the mean over subjects is 0.75
        correct = random.random((30, 20)) < share[:, None]
        for number, labels in enumerate((np.repeat(np.arange(30), 20), None)):
            found = accuracy(correct.ravel(), labels).estimate
            hits[number] += found.low <= 0.75 <= found.high
    assert 0.91 <= hits[0] / 200 <= 0.99
    assert hits[1] / 200 < 0.75
