"""Intervals over documents: exact values, honest coverage, the same every time."""

import numpy as np
import pytest

from kdctl import stats
from kdctl.base.errors import DataError
from kdctl.run.records import Estimate
from kdctl.stats import bootstrap

DOCUMENTS, DATA_SETS = 60, 300
LENGTHS = np.arange(5, 129)


def data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw lengths and two sums of documents; the mean of long documents is larger, and the two sums are correlated.

    Over the population, Σ before / Σ length is 0.3 and Σ after / Σ before is 0.5.
    """
    random = np.random.default_rng(seed)
    length = random.choice(LENGTHS, DOCUMENTS)
    rate = 0.3 * length * LENGTHS.mean() / np.square(LENGTHS).mean()
    before = length * rate * random.gamma(4, 1 / 4, DOCUMENTS)
    after = before * 0.5 * random.gamma(10, 1 / 10, DOCUMENTS)
    return length, before, after


def test_ratio_is_the_ratio_of_sums():
    assert stats.ratio([1, 2, 3], [4, 4, 8]).value == 6 / 16
    assert stats.ratio(np.array([0.5]), np.array([2.0])) == Estimate(value=0.25, low=0.25, high=0.25)


def test_documents_weigh_by_their_tokens():
    assert stats.ratio([10, 0], [100, 1]).value == 10 / 101


def test_constant_ratio_has_no_width():
    tokens = np.arange(1, 30)
    estimate = stats.ratio(2 * tokens, tokens)
    assert (estimate.low, estimate.value, estimate.high) == (2, 2, 2)


def test_interval_contains_the_value_and_narrows_with_documents():
    length, before, _ = data(0)
    short = stats.ratio(before[:15], length[:15])
    long = stats.ratio(before, length)
    for estimate in (short, long):
        assert estimate.low < estimate.value < estimate.high
    assert long.high - long.low < short.high - short.low


def test_resamples_of_which_nothing_can_be_said_are_left_out():
    found = stats.removed([0.0, 1.0, 0.0], [0.0, 2.0, 0.0])
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)
    found = stats.removed([1.0, 1.0], [0.0, 2.0])
    assert (found.low, found.value, found.high) == (-np.inf, 0.0, 0.5)


@pytest.mark.parametrize("before", [[0.0, 0.0], [-1e-9, 0.0], [np.nan, 1.0]])
def test_there_is_no_share_of_nothing(before: list[float]):
    with pytest.raises(DataError, match="nothing was lost"):
        stats.removed([0.0, 0.0], before)


def test_perplexities_beyond_float64_are_infinite():
    assert stats.exponential(Estimate(value=800, low=1, high=900)).value == np.inf


def coverage(estimates: list[Estimate], truth: float) -> float:
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))


def test_intervals_of_ratios_cover_the_truth_about_95_times_in_100(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    estimates = [stats.ratio(before, length) for length, before, _ in map(data, range(DATA_SETS))]
    assert 0.90 <= coverage(estimates, 0.3) <= 0.98
    below = np.mean([estimate.high < 0.3 for estimate in estimates])
    above = np.mean([estimate.low > 0.3 for estimate in estimates])
    assert max(below, above) < 0.07


def test_intervals_of_removed_cover_the_truth_about_95_times_in_100(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    estimates = [stats.removed(after, before) for _, before, after in map(data, range(DATA_SETS))]
    assert 0.90 <= coverage(estimates, 0.5) <= 0.98


def test_removed_is_one_minus_the_ratio_with_its_bounds_reversed():
    _, before, after = data(1)
    left, gone = stats.ratio(after, before), stats.removed(after, before)
    assert gone == Estimate(value=1 - left.value, low=1 - left.high, high=1 - left.low)
    assert gone.value == pytest.approx(1 - after.sum() / before.sum(), abs=1e-15)
    assert gone.low < gone.value < gone.high


def test_removed_is_zero_where_nothing_changed_and_negative_where_it_got_worse():
    _, before, _ = data(2)
    assert stats.removed(before, before) == Estimate(value=0, low=0, high=0)
    worse = stats.removed(1.5 * before, before)
    assert (worse.low, worse.value, worse.high) == pytest.approx((-0.5, -0.5, -0.5), rel=1e-12)


def test_removed_resamples_pairs_not_the_two_sides_apart():
    _, before, _ = data(3)
    after = 0.5 * before + 1e-3 * np.arange(DOCUMENTS)
    apart = stats.ratio(before, np.ones(DOCUMENTS))
    paired = stats.removed(after, before)
    assert paired.high - paired.low < 0.1 * (apart.high - apart.low) / apart.value


def test_estimates_are_the_same_every_time_and_for_scaled_data():
    length, before, _ = data(4)
    first = stats.ratio(before, length)
    np.random.seed(123)
    assert stats.ratio(before, length) == first
    doubled = stats.ratio(2 * before, length)
    assert (doubled.low, doubled.high) == pytest.approx((2 * first.low, 2 * first.high), rel=1e-12)


def test_exponential_maps_value_and_bounds():
    estimate = stats.exponential(Estimate(value=1.0, low=0.5, high=2.0))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(tuple(np.exp([1.0, 0.5, 2.0])), rel=1e-15)


def test_ratio_difference_is_the_difference_of_ratios_and_paired():
    length, before, after = data(5)
    found = stats.ratio_difference(before, after, length)
    assert found.value == pytest.approx((after.sum() - before.sum()) / length.sum(), rel=1e-12)
    assert stats.ratio_difference(before, before, length) == Estimate(value=0, low=0, high=0)
    alone = stats.ratio(before, length)
    shifted = stats.ratio_difference(before, before + 0.1 * length, length)
    assert (shifted.low, shifted.high) == pytest.approx((0.1, 0.1), abs=1e-12)
    assert alone.high - alone.low > 0.01
    assert stats.ratio_difference(before, after, length, 2 * length).value == pytest.approx(
        after.sum() / (2 * length.sum()) - before.sum() / length.sum(), rel=1e-12
    )


def test_intervals_of_differences_cover_the_truth_about_95_times_in_100(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    drawn = map(data, range(DATA_SETS))
    estimates = [stats.ratio_difference(before, after, length) for length, before, after in drawn]
    assert 0.90 <= coverage(estimates, -0.15) <= 0.98


def test_chunks_of_resamples_are_one_stream(monkeypatch: pytest.MonkeyPatch):
    length, before, _ = data(6)
    whole = stats.ratio(before, length)
    monkeypatch.setattr(bootstrap, "CHUNK", 1000)
    assert stats.ratio(before, length) == whole


def test_resampled_counts_are_a_bootstrap_of_the_columns():
    table = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (2, 300))
    by_count = bootstrap.resampled_counts(table, "a")
    one_by_one = bootstrap.resampled_sums(list(table))
    assert by_count.mean(1) == pytest.approx(table.sum(1), abs=1.5)
    assert np.cov(by_count) == pytest.approx(np.cov(one_by_one), rel=0.1, abs=10)
    assert (bootstrap.resampled_counts(table, "a") == by_count).all()
    assert np.corrcoef(by_count[0], bootstrap.resampled_counts(table, "b")[0])[0, 1] == pytest.approx(0, abs=0.1)
