"""Keyed random numbers: uniform, independent of order, and the same in every version of kdctl."""

import numpy as np
import pytest

from kdctl.base.rng import digest, permutation, shuffled_index, uniform

KEYS = 20_000


def test_numbers_are_uniform():
    values = np.array([uniform("test", 0, i) for i in range(KEYS)])
    assert ((values >= 0) & (values < 1)).all()
    assert abs(values.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / KEYS)
    assert abs(values.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / KEYS)
    counts = np.histogram(values, 20, (0, 1))[0]
    assert ((counts - KEYS / 20) ** 2 / (KEYS / 20)).sum() < 50  # χ² with 19 degrees of freedom: one in 10,000


def test_neighbouring_keys_are_uncorrelated():
    values = np.array([[uniform("test", seed, i) for i in range(4000)] for seed in (0, 1)])
    assert abs(np.corrcoef(values)[0, 1]) < 4 / np.sqrt(4000)
    assert abs(np.corrcoef(values[0, 1:], values[0, :-1])[0, 1]) < 4 / np.sqrt(4000)


def test_distinct_keys_have_distinct_numbers():
    assert len({digest("a", i, j) for i in range(100) for j in range(100)}) == 10_000
    keys = [("1",), (1,), ("1", 2), (1, 2), (12,), ("12",), (1, "2"), (2, 1), (), ("",), ("", ""), (-1,), (True,)]
    assert len({digest(*key) for key in keys}) == len(keys)


def test_same_key_gives_the_same_number_in_any_order():
    forward = [uniform("lambda", 3, i) for i in range(50)]
    assert [uniform("lambda", 3, i) for i in reversed(range(50))] == forward[::-1]


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_permutation_is_a_permutation(count: int):
    found = permutation(count, "order", 0)
    assert sorted(found.tolist()) == list(range(count))
    assert found.tolist() == permutation(count, "order", 0).tolist()


def test_permutations_of_distinct_keys_differ_and_put_items_anywhere():
    assert permutation(100, "order", 0).tolist() != permutation(100, "order", 1).tolist()
    first = np.bincount([permutation(5, "order", seed)[0] for seed in range(2000)], minlength=5)
    assert (abs(first - 400) < 5 * np.sqrt(400)).all()


def test_kept_permutation_is_drawn_once_and_cannot_be_spoiled():
    found = permutation(1000, "kept", 0)
    assert permutation(1000, "kept", 0) is found
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0
    assert permutation(1000, "kept", "0").tolist() != found.tolist()
    assert permutation(1000, "kept", True).tolist() != permutation(1000, "kept", 1).tolist()


@pytest.mark.parametrize("count", [1, 3, 10])
def test_every_pass_takes_each_item_exactly_once(count: int):
    passes = [[shuffled_index(epoch * count + i, count, "order", 0) for i in range(count)] for epoch in range(6)]
    assert all(sorted(order) == list(range(count)) for order in passes)
    if count == 10:
        assert len({tuple(order) for order in passes}) == 6


def test_two_sequences_of_ten_thousand_items_draw_one_permutation_a_pass(monkeypatch: pytest.MonkeyPatch):
    drawn: list[int] = []
    generator = np.random.Generator
    monkeypatch.setattr(np.random, "Generator", lambda bits: drawn.append(1) or generator(bits))
    for slot in range(25_000):
        for name in ("first", "second"):
            shuffled_index(slot, 10_000, "passes", name)
    assert len(drawn) == 6
    assert permutation(10_000, "passes", "first", 2).nbytes == 40_000


def test_numbers_are_frozen():
    """Stores and variants on disk were made from these numbers: another hash would silently make them unrepeatable."""
    assert digest("lambda", 0, 0, 0) == 3741831468730395017
    assert uniform("lambda", 0, 0, 0) == 0.20284509037360599
    assert permutation(8, "order", 0, "student", 0).tolist() == [6, 7, 3, 5, 4, 2, 0, 1]
    assert shuffled_index(11, 8, "order", 0, "student") == 0
