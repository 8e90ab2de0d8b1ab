"""Several seeds: variance components in closed form, one seed, and intervals that cover over seeds and items."""

import numpy as np
import pytest
from scipy.stats import norm

from kdctl.base.errors import DataError
from kdctl.run.records import Estimate
from kdctl.stats import Paired, Repeated, average_seeds, compare, compare_seeds, compare_seeds_average, seeds, widen

SEED_SD, RESIDUAL_SD = 0.3, 0.4


def answers(random: np.random.Generator, count: int, ability: np.ndarray, seed_sd: float = SEED_SD) -> np.ndarray:
    """Draw (count, items) answers that are right where ability + seed + residual is above 0."""
    noise = random.normal(0, seed_sd, (count, 1)) + random.normal(0, RESIDUAL_SD, (count, len(ability)))
    return ability + noise > 0


def test_components_are_those_of_the_two_way_analysis_of_variance() -> None:
    """Sums of squares by explicit loops, as in a textbook table."""
    matrix = answers(np.random.default_rng(0), 4, np.random.default_rng(1).normal(0.5, 1, 60)).astype(float)
    count, items = matrix.shape
    grand = matrix.mean()
    by_seed = sum(items * (row.mean() - grand) ** 2 for row in matrix) / (count - 1)
    by_item = sum(count * (column.mean() - grand) ** 2 for column in matrix.T) / (items - 1)
    total = sum((value - grand) ** 2 for value in matrix.ravel())
    residual = (total - (count - 1) * by_seed - (items - 1) * by_item) / ((count - 1) * (items - 1))
    found = seeds(matrix)
    assert found.residual_variance == pytest.approx(residual, rel=1e-9)
    assert found.seed_variance == pytest.approx((by_seed - residual) / items, rel=1e-9)
    assert found.item_variance == pytest.approx((by_item - residual) / count, rel=1e-9)
    assert found.clipped == ()
    parts = (found.seed_variance or 0) / count + (found.item_variance or 0) / items + residual / (count * items)
    assert found.standard_error == pytest.approx(np.sqrt(parts), rel=1e-9)


def test_negative_components_are_zero_and_named() -> None:
    matrix = np.array([[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0]])
    found = seeds(matrix)
    assert (found.seed_variance, found.item_variance) == (0, 0)
    assert found.clipped == ("seed", "item")
    assert found.standard_error == pytest.approx(np.sqrt((found.residual_variance or 0) / 12))


def test_one_seed_leaves_its_part_unknown_not_zero() -> None:
    row = np.random.default_rng(3).random(200) < 0.7
    found = seeds(row[None])
    assert found.seed_variance is found.item_variance is found.residual_variance is None
    assert found.standard_error == pytest.approx(row.std(ddof=1) / np.sqrt(200), rel=1e-9)


def test_equal_seeds_leave_the_uncertainty_of_the_items() -> None:
    row = np.random.default_rng(3).random(200) < 0.7
    found = seeds(np.tile(row, (4, 1)))
    assert found.seed_variance == found.residual_variance == 0
    assert found.standard_error == pytest.approx(row.std(ddof=1) / np.sqrt(200), rel=1e-9)


def test_all_right_is_not_certain() -> None:
    found = seeds(np.ones((3, 30)))
    assert found.accuracy.low == pytest.approx(30 / (30 + 1.959964**2), rel=1e-6)
    assert found.accuracy.high == 1


def test_clusters_widen_the_interval_and_one_group_leaves_it_open() -> None:
    random = np.random.default_rng(4)
    matrix = answers(random, 3, np.repeat(random.normal(0.5, 1, 20), 10), 0.0)
    apart, together = seeds(matrix), seeds(matrix, np.repeat(np.arange(20), 10))
    assert (together.standard_error or 0) > 1.5 * (apart.standard_error or 0)
    only = seeds(matrix, ["only"] * 200)
    assert (only.standard_error, only.accuracy.low, only.accuracy.high) == (None, 0, 1)


@pytest.mark.parametrize(("count", "items", "seed_sd"), [(3, 300, 0.05), (3, 600, 0.3), (5, 300, 0.1)])
def test_intervals_cover_over_seeds_and_items(count: int, items: int, seed_sd: float) -> None:
    random = np.random.default_rng(count + items)
    truth = float(norm.cdf(0.5 / np.sqrt(1 + RESIDUAL_SD**2 + seed_sd**2)))
    hits = 0
    for _ in range(250):
        found = seeds(answers(random, count, random.normal(0.5, 1, items), seed_sd)).accuracy
        hits += found.low <= truth <= found.high
    assert 0.91 <= hits / 250 <= 0.99


def test_intervals_of_differences_cover_and_those_of_one_seed_do_not() -> None:
    random = np.random.default_rng(9)
    hits = np.zeros(2)
    for _ in range(150):
        ability = random.normal(0.5, 1, 400)
        a, b = answers(random, 3, ability), answers(random, 3, ability)
        for number, found in enumerate((compare_seeds(a, b), compare_seeds(a[:1], b[:1]))):
            hits[number] += found.difference.low <= 0 <= found.difference.high
            assert (found.p < 0.05) == (not found.difference.low <= 0 <= found.difference.high)
    assert hits[0] / 150 >= 0.93
    assert hits[1] / 150 < 0.6


def test_one_seed_each_is_the_paired_comparison_and_says_what_it_leaves_out() -> None:
    random = np.random.default_rng(5)
    ability = random.normal(0.5, 1, 500)
    a, b = answers(random, 1, ability), answers(random, 1, ability)
    several, once = compare_seeds(a, b), compare(Paired(a[0], b[0]))
    assert several.standard_error == pytest.approx(once.standard_error, rel=1e-9)
    assert several.difference.value == pytest.approx(once.difference.value, abs=1e-12)
    assert several.difference.high == pytest.approx(once.difference.high, abs=2e-3)
    assert several.seed_variances == (None, None)
    assert several.words.endswith("one seed does not show how much other seeds differ")
    assert "one seed" not in compare_seeds(answers(random, 2, ability), answers(random, 2, ability)).words


def test_seeds_of_unequal_number_can_be_compared_and_turned_round() -> None:
    random = np.random.default_rng(6)
    ability = random.normal(0.5, 1, 500)
    a, b = answers(random, 2, ability), answers(random, 4, ability)
    one, other = compare_seeds(a, b), compare_seeds(b, a)
    assert (one.seeds, other.seeds) == ((2, 4), (4, 2))
    assert one.difference.low == pytest.approx(-other.difference.high)
    assert one.p == pytest.approx(other.p)


def test_equal_answers_to_few_items_are_not_equivalence() -> None:
    row = np.tile(np.arange(30) % 2, (3, 1))
    assert compare_seeds(row, row).verdict == "cannot tell"
    row = np.tile(np.arange(3000) % 2, (3, 1))
    assert compare_seeds(row, row).verdict == "equivalent"


def test_shapes_are_seeds_by_items() -> None:
    with pytest.raises(DataError, match="Put the answers of one seed in one row"):
        seeds([1, 0, 1])
    with pytest.raises(DataError, match="a has 2 items and b 3"):
        compare_seeds([[1, 0]], [[1, 0, 1]])


def test_an_average_of_one_task_is_that_task() -> None:
    random = np.random.default_rng(8)
    first, second = (answers(random, count, random.normal(0.5, 1, 90)) for count in (3, 2))
    apart = compare_seeds(first, second)
    assert compare_seeds_average({"only": Repeated(first, second)}) == apart
    assert average_seeds({"only": first}, {"only": None})[0] == seeds(first).accuracy
    assert average_seeds({"only": first}, {"only": None})[1] == seeds(first).standard_error


def test_averages_cover_where_a_seed_is_good_at_every_task() -> None:
    """A seed's effect is common to both tasks, so it does not average out over them."""
    random = np.random.default_rng(9)
    hits = 0
    for _ in range(250):
        common = random.normal(0, SEED_SD, (2, 3, 1))
        drawn = [answers_of(random, common, random.normal(0.5, 1, 200)) for _ in range(2)]
        pairs = {str(task): Repeated(*both) for task, both in enumerate(drawn)}
        found = compare_seeds_average(pairs).difference
        hits += found.low <= 0 <= found.high
    assert hits / 250 >= 0.91


def answers_of(random: np.random.Generator, common: np.ndarray, ability: np.ndarray) -> np.ndarray:
    """Draw (settings, seeds, items) answers whose seeds' effects are given."""
    return ability + common + random.normal(0, RESIDUAL_SD, (*common.shape[:2], len(ability))) > 0


def test_seeds_widen_an_interval_over_documents_by_their_own() -> None:
    estimate = Estimate(value=1.0, low=0.9, high=1.2)
    assert widen(estimate, [1.0]) == estimate
    assert widen(estimate, [1.0, 1.0]).high == pytest.approx(1.2)
    found = widen(estimate, [0.9, 1.1])  # standard error 0.1, t with 1 degree of freedom 12.706
    assert (found.high - 1, 1 - found.low) == pytest.approx((np.hypot(0.2, 1.2706), np.hypot(0.1, 1.2706)), rel=1e-4)


def test_a_fixed_model_has_no_other_seeds_to_speak_of() -> None:
    random = np.random.default_rng(10)
    one, three = (answers(random, count, random.normal(0.5, 1, 90)) for count in (1, 3))
    pair = {"task": Repeated(one, three)}
    assert "one seed does not show" in compare_seeds_average(pair).words
    assert "one seed does not show" not in compare_seeds_average(pair, fixed=True).words
