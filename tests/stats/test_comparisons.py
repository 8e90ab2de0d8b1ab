"""Paired comparisons: closed forms, statsmodels, coverage by simulation, and what few or equal answers may claim."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from kdctl.base.errors import DataError
from kdctl.stats import Paired, bootstrap, compare, compare_average, holm
from kdctl.stats.findings import Comparison
from kdctl.stats.proportions import tango

Z = float(norm.ppf(0.975))


def pair(beneficial: int, harmful: int, items: int, clusters: object = None) -> Paired:
    """Make answers with given flips; of the items that did not flip every other is right."""
    a, b = np.arange(items) % 2 == 0, np.arange(items) % 2 == 0
    a[: beneficial + harmful] = np.arange(beneficial + harmful) >= beneficial
    b[: beneficial + harmful] = ~a[: beneficial + harmful]
    return Paired(a, b, clusters)  # pyright: ignore[reportArgumentType]


def drawn(random: np.random.Generator, items: int, up: float, down: float) -> Paired:
    """Draw answers that are independent over items; the true difference is up − down."""
    kind = random.choice(4, items, p=[up, down, 0.6, 0.4 - up - down])
    return Paired(np.isin(kind, (1, 2)), np.isin(kind, (0, 2)))


def grouped(random: np.random.Generator, groups: int, size: int) -> Paired:
    """Draw answers whose flips come in groups, each leaning one way; the true difference is 0."""
    often = np.repeat(random.beta(0.2, 1.8, groups) * 0.6, size)
    way = np.repeat(random.random(groups) < 0.5, size)
    flips = random.random(groups * size) < often
    a = np.where(flips, ~way, random.random(groups * size) < 0.7)
    return Paired(a, np.where(flips, way, a), np.repeat(np.arange(groups), size))


def test_flips_are_counted_and_the_difference_is_theirs() -> None:
    found = compare(pair(12, 5, 100))
    assert (found.beneficial, found.harmful, found.items, found.groups) == (12, 5, 100, 100)
    assert found.flip_rate == 0.17
    assert found.difference.value == pytest.approx(0.07)
    assert (found.difference.low, found.difference.high) == pytest.approx(tango(12, 5, 100, Z))
    variance = (0.17 - 0.07**2) / 99
    assert found.standard_error == pytest.approx(np.sqrt(variance))


@pytest.mark.parametrize(("beneficial", "harmful"), [(12, 5), (6, 16), (0, 4), (0, 0)])
def test_mcnemar_is_that_of_statsmodels(beneficial: int, harmful: int) -> None:
    table = [[40, harmful], [beneficial, 100]]
    expected = mcnemar(table, exact=True).pvalue if beneficial + harmful else 1  # pyright: ignore[reportAttributeAccessIssue]
    assert compare(pair(beneficial, harmful, 200)).p_mcnemar == pytest.approx(min(1, expected), rel=1e-12)


def test_p_is_the_larger_of_the_score_test_and_the_exact_one() -> None:
    """Four flips that all go one way have a score p of 4.6 % but an exact one of 12.5 %."""
    few = compare(pair(4, 0, 1000))
    assert few.difference.low > 0
    assert few.p == few.p_mcnemar == 0.125
    assert few.verdict != "better"
    many = compare(pair(300, 240, 5000))
    assert many.p == pytest.approx(max(many.p_mcnemar, 2 * norm.sf(60 / np.sqrt(540))), rel=1e-6)


def test_clustered_standard_error_is_that_of_statsmodels() -> None:
    example = grouped(np.random.default_rng(0), 20, 15)
    fit = sm.OLS(example.difference, np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": example.clusters})
    assert compare(example).standard_error == pytest.approx(fit.bse[0], rel=1e-10)


def test_clusters_of_one_item_change_nothing_but_the_quantile() -> None:
    plain, labelled = compare(pair(30, 20, 2000)), compare(pair(30, 20, 2000, np.arange(2000)))
    assert labelled.standard_error == pytest.approx(plain.standard_error, rel=1e-12)
    assert labelled.difference.high == pytest.approx(plain.difference.high, rel=2e-3)
    assert labelled.bootstrap == plain.bootstrap


def test_the_order_of_items_does_not_matter_and_nothing_is_random() -> None:
    example = grouped(np.random.default_rng(1), 20, 15)
    order = np.random.default_rng(2).permutation(300)
    clusters = np.asarray(example.clusters)
    shuffled = Paired(np.asarray(example.a)[order], np.asarray(example.b)[order], clusters[order])
    first, second = compare(example), compare(shuffled)
    assert compare(example) == first
    assert second.bootstrap == first.bootstrap
    assert second.difference.low == pytest.approx(first.difference.low, rel=1e-9)


def test_turning_the_models_round_turns_the_signs() -> None:
    one, other = compare(pair(60, 20, 1000)), compare(pair(20, 60, 1000))
    assert (one.verdict, other.verdict) == ("better", "worse")
    assert (other.difference.low, other.difference.high) == pytest.approx((-one.difference.high, -one.difference.low))
    assert (one.p, one.mde) == pytest.approx((other.p, other.mde))


def test_equal_answers_to_few_items_are_not_equivalence() -> None:
    few, many = compare(pair(0, 0, 30)), compare(pair(0, 0, 3000))
    assert few.difference.value == few.standard_error == 0
    assert few.difference.high == pytest.approx(Z**2 / (30 + Z**2))
    assert few.verdict == "cannot tell"
    assert many.verdict == "equivalent"
    assert compare(pair(0, 0, 30), margin=0.2).verdict == "equivalent"


def test_one_group_says_nothing_but_fails_nowhere() -> None:
    found = compare(pair(9, 0, 10, ["only"] * 10))
    assert (found.difference.low, found.difference.high) == pytest.approx((-1, 1))
    assert found.standard_error is None
    assert (found.verdict, found.mde, found.p) == ("cannot tell", 1, 1)


def test_grouped_flips_widen_the_interval() -> None:
    example = grouped(np.random.default_rng(7), 20, 15)
    together, apart = compare(example), compare(Paired(example.a, example.b))
    for found, wider in ((apart.difference, together.difference), (apart.bootstrap, together.bootstrap)):
        assert wider.high - wider.low > 1.3 * (found.high - found.low)


def share(found: list[Comparison], truth: float) -> tuple[float, float]:
    covered = np.mean([each.difference.low <= truth <= each.difference.high for each in found])
    bootstrapped = np.mean([each.bootstrap.low <= truth <= each.bootstrap.high for each in found])
    return float(covered), float(bootstrapped)


def test_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 300)
    random = np.random.default_rng(11)
    covered, bootstrapped = share([compare(drawn(random, 400, 0.05, 0.03)) for _ in range(100)], 0.02)
    assert 0.91 <= covered <= 0.99
    assert 0.9 <= bootstrapped <= 0.99
    covered, bootstrapped = share([compare(grouped(random, 40, 15)) for _ in range(100)], 0)
    assert 0.91 <= covered <= 0.99
    assert bootstrapped >= 0.86


def test_intervals_of_averages_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 300)
    random = np.random.default_rng(12)
    found = [
        compare_average(
            {"a": drawn(random, 300, 0.03, 0.02), "b": grouped(random, 30, 10)}, weights={"a": 0.6, "b": 0.4}
        )
        for _ in range(100)
    ]
    covered, bootstrapped = share(found, 0.6 * 0.01)
    assert covered >= 0.92
    assert bootstrapped >= 0.87


def test_an_average_of_one_task_is_the_task() -> None:
    assert compare_average({"arc": pair(12, 5, 100)}) == compare(pair(12, 5, 100))


def test_an_average_weighs_tasks_not_items() -> None:
    pairs = {"large": pair(50, 20, 3000), "small": pair(2, 8, 100)}
    found = compare_average(pairs)
    assert found.difference.value == pytest.approx((0.01 - 0.06) / 2)
    alone = [compare(each).standard_error or 0 for each in pairs.values()]
    assert found.standard_error == pytest.approx(np.linalg.norm(alone) / 2)
    assert (found.beneficial, found.harmful, found.items) == (52, 28, 3100)
    by_items = compare_average(pairs, weights={"large": 3000 / 3100, "small": 100 / 3100})
    assert by_items.difference.value == pytest.approx((52 - 28) / 3100)


def test_a_task_counted_twice_narrows_nothing_where_its_items_are_known() -> None:
    ids = [f"item {i}" for i in range(500)]
    once = compare(pair(30, 18, 500, ids))
    twice = compare_average({"one": pair(30, 18, 500, ids), "two": pair(30, 18, 500, ids)})
    assert twice.difference.low == pytest.approx(once.difference.low, rel=1e-9)
    assert twice.standard_error == pytest.approx(once.standard_error, rel=1e-9)
    assert twice.bootstrap == once.bootstrap
    unknown = compare_average({"one": pair(30, 18, 500), "two": pair(30, 18, 500)})
    assert unknown.standard_error == pytest.approx((once.standard_error or 0) / np.sqrt(2), rel=1e-9)


def test_averages_of_equal_answers_stay_uncertain() -> None:
    found = compare_average({"a": pair(0, 0, 30), "b": pair(0, 0, 30)})
    assert found.difference.high == pytest.approx(Z**2 / (30 + Z**2) / np.sqrt(2))
    assert found.verdict == "cannot tell"
    ids = [f"item {i}" for i in range(30)]
    same = compare_average({"a": pair(0, 0, 30, ids), "b": pair(0, 0, 30, ids)})
    assert same.difference.high == pytest.approx(compare(pair(0, 0, 30, ids)).difference.high)


def test_holm_by_hand() -> None:
    """Sorted .01, .03, .04 times 3, 2, 1 and made monotone: .03, .06, .06."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1, "b": 1}
    assert holm({"a": 0.02}) == {"a": 0.02}
    assert holm({}) == {}


def test_holm_is_that_of_statsmodels() -> None:
    values = np.random.default_rng(11).random(40) ** 4
    expected = multipletests(values, method="holm")[1]
    assert list(holm({str(index): value for index, value in enumerate(values)}).values()) == pytest.approx(expected)


def test_pairs_are_pairs() -> None:
    with pytest.raises(DataError, match=r"a has shape \(3,\) and b \(2,\)"):
        Paired([1, 0, 1], [1, 0])
    with pytest.raises(DataError, match="one answer of each an item"):
        Paired([[1, 0]], [[1, 0]])
    with pytest.raises(DataError, match="each right"):
        Paired([0.5], [1])
    with pytest.raises(DataError, match="1 cluster labels came with 2 items"):
        Paired([1, 0], [1, 0], ["a"])
    with pytest.raises(DataError, match="equivalence margin is 0"):
        compare(pair(1, 1, 10), margin=0)
