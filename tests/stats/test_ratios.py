"""Averages of ratios of sums: references, clusters, and how often intervals hold the truth."""

import numpy as np
import pytest

from kdctl import stats
from kdctl.base.errors import DataError
from kdctl.stats import Ratio


def drawn(seed: int, items: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Draw sizes, and sums whose mean for a size is 1.5 times it."""
    numbers = np.random.default_rng(seed)
    sizes = numbers.integers(1, 40, items).astype(float)
    return sizes * numbers.gamma(3.0, 0.5, items), sizes


def test_the_value_is_the_mean_of_the_tasks_ratios() -> None:
    first, second = drawn(0), drawn(1)
    found = stats.average_ratio({"a": Ratio(*first), "b": Ratio(*second)})
    assert found.value == pytest.approx((first[0].sum() / first[1].sum() + second[0].sum() / second[1].sum()) / 2)


def test_one_tasks_interval_is_near_the_bootstraps() -> None:
    tops, sizes = drawn(2, 2000)
    found, reference = stats.average_ratio({"a": Ratio(tops, sizes)}), stats.ratio(tops, sizes)
    assert found.value == pytest.approx(reference.value)
    assert found.high - found.low == pytest.approx(reference.high - reference.low, rel=0.1)


def test_items_of_one_cluster_count_once() -> None:
    tops, sizes = drawn(3, 50)
    alone = stats.average_ratio({"a": Ratio(tops, sizes)})
    labels = np.repeat(np.arange(50), 4)
    together = stats.average_ratio({"a": Ratio(np.repeat(tops, 4), np.repeat(sizes, 4), labels)})
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = 0
    for seed in range(400):
        parts = {name: Ratio(*drawn(1000 + 2 * seed + offset)) for offset, name in enumerate("ab")}
        found = stats.average_ratio(parts)
        held += found.low <= 1.5 <= found.high
    assert 0.92 < held / 400 < 0.975


def test_one_group_says_nothing_of_others() -> None:
    found = stats.average_ratio({"a": Ratio([1.0, 2.0], [1.0, 1.0], ["x", "x"])})
    assert (found.value, found.low, found.high) == (1.5, -np.inf, np.inf)


@pytest.mark.parametrize(("tops", "bottoms"), [([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([[1.0]], [[1.0]])])
def test_what_is_no_ratio_is_refused(tops: list, bottoms: list) -> None:
    with pytest.raises(DataError, match="a ratio needs"):
        Ratio(tops, bottoms)
