"""Verdicts: what is claimed, what goes first, and in which words."""

import numpy as np
import pytest
from scipy.stats import norm

from kdctl.base.errors import DataError
from kdctl.run.records import Estimate
from kdctl.stats.verdicts import decide, detectable, p_value, require_margin


def interval(value: float, standard_error: float, level: float = 0.95) -> Estimate:
    half = float(norm.ppf((1 + level) / 2)) * standard_error
    return Estimate(value=value, low=value - half, high=value + half)


def verdict(value: float, standard_error: float) -> tuple[str, str]:
    p = float(2 * norm.sf(abs(value) / standard_error))
    return decide(interval(value, standard_error), interval(value, standard_error, 0.9), p, 0.005)


@pytest.mark.parametrize(
    ("value", "standard_error", "expected", "words"),
    [
        (0.02, 0.005, "better", "better by 2.00 points (+1.02 to +2.98)"),
        (-0.02, 0.005, "worse", "worse by 2.00 points (-2.98 to -1.02)"),
        (0.001, 0.002, "equivalent", "equivalent within ±0.5 points"),
        (0.003, 0.01, "cannot tell", "cannot tell: this comparison could only see differences above 2.8 points"),
        (0.003, 0.001, "equivalent", "equivalent within ±0.5 points (though +0.30 points is a significant difference)"),
    ],
)
def test_verdicts_and_words(value: float, standard_error: float, expected: str, words: str) -> None:
    assert verdict(value, standard_error) == (expected, words)


def test_equivalence_is_two_one_sided_tests_at_five_percent() -> None:
    """Schuirmann: both |value ∓ margin| / SE must exceed z.95; just below and above that the verdict turns."""
    edge = (0.005 - 0.002) / float(norm.ppf(0.95))
    assert verdict(0.002, 0.999 * edge)[0] == "equivalent"
    assert verdict(0.002, 1.001 * edge)[0] == "cannot tell"


def test_what_could_be_seen_is_seen_in_80_of_100() -> None:
    smallest = detectable(interval(0.1, 0.01))
    assert smallest == pytest.approx((1.959964 + 0.841621) * 0.01, rel=1e-6)
    z = np.random.default_rng(0).normal(smallest / 0.01, 1, 20_000)
    assert np.mean(np.abs(z) > 1.959964) == pytest.approx(0.8, abs=0.01)
    assert detectable(Estimate(value=0, low=-1, high=1)) == 1


@pytest.mark.parametrize("value", [0.013, -0.004, 0.0001])
def test_p_inverts_an_interval(value: float) -> None:
    p = p_value(lambda level: interval(value, 0.005, level))
    assert p == pytest.approx(2 * norm.sf(abs(value) / 0.005), rel=1e-6)


def test_p_has_its_ends() -> None:
    assert p_value(lambda level: interval(0, 0.005, level)) == 1
    assert p_value(lambda level: interval(1, 0.005, level)) == 1e-12


@pytest.mark.parametrize("margin", [0, -0.1, 1, float("nan")])
def test_a_margin_is_a_fraction(margin: float) -> None:
    with pytest.raises(DataError, match=r"Half a point of accuracy is 0\.005"):
        require_margin(margin)
