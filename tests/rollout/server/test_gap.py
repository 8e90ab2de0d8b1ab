"""The gap separates other weights from rounding, and stale weights from new ones by what training moved."""

import pytest
import torch

from kdctl.rollout.server.gap import BOUND, gap, slope


def noise(size, seed=0, tokens=400):
    return size * torch.randn(tokens, generator=torch.Generator().manual_seed(seed))


def test_mean_and_largest_are_absolute_differences():
    found = gap(torch.tensor([-1.0, -2.5]), torch.tensor([-1.1, -2.0]))
    assert (found.mean, found.largest, found.tokens, found.slope) == (pytest.approx(0.3), pytest.approx(0.5), 2, None)


def test_a_gap_beyond_the_bound_is_not_sound():
    here = noise(1.0)
    assert gap(here + BOUND * 0.99, here).sound
    assert not gap(here + BOUND * 1.01, here).sound
    assert not gap(here * float("nan"), here).sound


def test_a_stale_server_is_told_below_the_noise():
    old, moved = noise(1.0, 1), noise(0.03, 2)  # training moved less than rounding does
    new, rounding = old + moved, noise(0.05, 3)
    fresh, stale = gap(new + rounding, new, old), gap(old + rounding, new, old)
    assert fresh.mean < BOUND
    assert stale.mean < BOUND
    assert fresh.slope == pytest.approx(1, abs=0.3)
    assert stale.slope == pytest.approx(0, abs=0.3)
    assert fresh.sound
    assert not stale.sound


def test_what_cannot_be_told_apart_is_not_judged():
    old = noise(1.0, 1)
    assert slope(old + noise(0.05, 3), old, old) is None
    assert slope(old + noise(0.05, 3), old + noise(0.001, 2), old) is None


def test_equal_numbers_have_a_slope_without_noise():
    old, new = noise(1.0, 1), noise(1.0, 2)
    assert slope(new, new, old) == pytest.approx(1)
    assert slope(old, new, old) == pytest.approx(0)
