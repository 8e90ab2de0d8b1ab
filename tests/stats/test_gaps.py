"""Recovery: Fieller's interval against its definition, coverage, and the numbers that are not given."""

import numpy as np
import pytest

from kdctl.base.errors import DataError
from kdctl.stats import Trio, bootstrap, recovery, recovery_average
from kdctl.stats.gaps import fieller
from kdctl.stats.groups import covariance

COVARIANCE = np.array([[4.0, 1.5], [1.5, 2.0]]) * 1e-4


def answers(random: np.random.Generator, items: int, share: float = 0.4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw student, PTQ and teacher: quantization loses a tenth of the teacher's, the student regains a share of it."""
    teacher, lot = random.random(items) < 0.75, random.random(items)
    ptq = np.where(lot < 0.1, False, np.where(lot > 0.98, True, teacher))
    return np.where(random.random(items) < share, teacher, ptq), ptq, teacher


def test_fieller_bounds_are_where_the_standardized_difference_is_z() -> None:
    bounds = fieller(0.03, 0.06, COVARIANCE, 1.96)
    assert bounds is not None
    for bound in bounds:
        variance = np.array([1, -bound]) @ COVARIANCE @ np.array([1, -bound])
        assert abs(0.03 - bound * 0.06) == pytest.approx(1.96 * np.sqrt(variance), rel=1e-9)
    assert bounds[0] < 0.5 < bounds[1]


def test_fieller_is_the_delta_method_where_the_gap_is_certain() -> None:
    small = COVARIANCE * 1e-4
    bounds = fieller(0.03, 0.06, small, 1.96)
    gradient = np.array([1, -0.5]) / 0.06
    half = 1.96 * np.sqrt(gradient @ small @ gradient)
    assert bounds == pytest.approx((0.5 - half, 0.5 + half), rel=1e-4)


def test_fieller_has_no_end_where_the_gap_is_within_noise() -> None:
    assert fieller(0.03, 0.027, COVARIANCE, 1.96) is None
    assert fieller(0.03, 0.028, COVARIANCE, 1.96) is not None


def test_recovery_is_the_share_of_the_gap_that_came_back() -> None:
    student, ptq, teacher = answers(np.random.default_rng(0), 3000)
    found = recovery(student, ptq, teacher)
    assert found.estimate is not None
    assert found.bootstrap is not None
    assert found.estimate.value == pytest.approx((student.mean() - ptq.mean()) / (teacher.mean() - ptq.mean()))
    columns = [student.astype(float) - ptq, teacher.astype(float) - ptq]
    expected = fieller(columns[0].mean(), columns[1].mean(), covariance(columns, np.arange(3000)), 1.959964)
    assert (found.estimate.low, found.estimate.high) == pytest.approx(expected, rel=1e-6)
    assert (found.bootstrap.low, found.bootstrap.high) == pytest.approx(expected, abs=0.03)
    assert found.reason is None


def test_all_or_nothing() -> None:
    _, ptq, teacher = answers(np.random.default_rng(0), 3000)
    for student, share in ((teacher, 1), (ptq, 0)):
        found = recovery(student, ptq, teacher).estimate
        assert found is not None
        assert (found.low, found.value, found.high) == pytest.approx((share, share, share), abs=1e-6)


def test_no_number_without_a_gap() -> None:
    student, ptq, teacher = answers(np.random.default_rng(1), 60)
    found = recovery(student, ptq, ptq)
    assert found.estimate is found.bootstrap is None
    assert "within noise" in (found.reason or "")
    assert recovery(teacher, ptq, teacher, ["only"] * 60).reason == (
        "the gap between teacher and PTQ student is within noise (-100.00 to +100.00 points)"
    )


def test_no_number_where_quantization_helped() -> None:
    student, ptq, teacher = answers(np.random.default_rng(2), 3000)
    found = recovery(student, teacher, ptq)
    assert found.estimate is None
    assert "nothing was lost" in (found.reason or "")


def test_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 200)
    random = np.random.default_rng(3)
    found = [recovery(*answers(random, 800)).estimate for _ in range(100)]
    given = [each for each in found if each is not None]
    assert len(given) > 92
    assert 0.91 <= np.mean([each.low <= 0.4 <= each.high for each in given]) <= 0.99


def test_groups_widen_the_interval() -> None:
    student, ptq, teacher = (np.repeat(each, 5) for each in answers(np.random.default_rng(4), 600))
    apart = recovery(student, ptq, teacher).estimate
    together = recovery(student, ptq, teacher, np.repeat(np.arange(600), 5)).estimate
    assert apart is not None
    assert together is not None
    assert together.high - together.low > 1.8 * (apart.high - apart.low)


def test_recovery_of_an_average_is_that_of_averaged_accuracies() -> None:
    random = np.random.default_rng(5)
    first, second = answers(random, 3000), answers(random, 1000, 0.7)
    found = recovery_average({"a": Trio(*first), "b": Trio(*second)})
    gain = np.mean([student.mean() - ptq.mean() for student, ptq, _ in (first, second)])
    gap = np.mean([teacher.mean() - ptq.mean() for _, ptq, teacher in (first, second)])
    assert found.estimate is not None
    assert found.estimate.value == pytest.approx(gain / gap)
    assert found.gap.items == 4000
    assert recovery_average({"a": Trio(*first)}) == recovery(*first)
    assert recovery_average({"a": Trio(*first), "b": Trio(*second)}, {"a": 1.0, "b": 0.0}).estimate == pytest.approx(
        recovery(*first).estimate
    )


def test_answers_are_to_the_same_items() -> None:
    with pytest.raises(DataError, match="Compare the items that both have"):
        recovery([1, 0], [1, 0], [1, 0, 1])
