"""Averages over tasks: covariances and the bootstrap against brute force."""

import numpy as np
import pytest

from kdctl.base.errors import DataError
from kdctl.stats.averages import Task, averages, correlation, covariance, number_tasks, resample, resolve_weights

RANDOM = np.random.default_rng(3)
SHARED = [f"id {i}" for i in range(60)]


def tasks() -> list[Task]:
    """Draw three tasks: 60 items; the same items and 40 more, answered alike; 90 items in 30 groups of their own."""
    base = RANDOM.choice([-1, 0, 1], (2, 100), p=[0.2, 0.6, 0.2])
    other = np.where(RANDOM.random((2, 100)) < 0.8, base, -base)
    third = np.repeat(RANDOM.choice([-1, 0, 1], (2, 30)), 3, axis=1)
    numbers = number_tasks(
        {
            "first": (60, SHARED),
            "second": (100, SHARED + [f"more {i}" for i in range(40)]),
            "third": (90, np.repeat(np.arange(30), 3)),
        }
    )
    columns = {"first": base[:, :60], "second": other, "third": third}
    weights = {"first": 0.5, "second": 0.3, "third": 0.2}
    return [Task(columns[name].astype(float), numbers[name], weights[name]) for name in columns]


def brute_force(drawn: list[Task], resamples: int) -> np.ndarray:
    """Draw whole groups one by one, in the strata of the tasks above, and average what they bring; (resamples, C)."""
    strata = [np.arange(60), np.arange(60, 100), np.arange(100, 130)]
    found = []
    for _ in range(resamples):
        picked = np.concatenate([RANDOM.choice(stratum, len(stratum)) for stratum in strata])
        times = np.bincount(picked, minlength=130)
        means = [(task.columns * times[task.groups]).sum(1) / times[task.groups].sum() for task in drawn]
        found.append(sum(task.weight * mean for task, mean in zip(drawn, means, strict=True)))
    return np.array(found)


def test_covariances_and_bootstrap_agree_with_brute_force() -> None:
    drawn = tasks()
    expected = np.cov(brute_force(drawn, 4000).T)
    assert covariance(drawn) == pytest.approx(expected, rel=0.12, abs=2e-5)
    assert np.cov(resample(drawn)) == pytest.approx(expected, rel=0.12, abs=2e-5)


def test_tasks_covary_through_shared_items_only() -> None:
    related = correlation(tasks())
    assert related[0, 1] > 0.2
    assert related[0, 2] == related[1, 2] == 0
    assert np.diag(related).tolist() == [1, 1, 1]


def test_two_names_of_one_task_are_as_uncertain_as_the_task() -> None:
    values = RANDOM.choice([-1.0, 0.0, 1.0], (1, 50))
    numbers = number_tasks({"once": (50, SHARED[:50]), "again": (50, SHARED[:50])})
    one = [Task(values, numbers["once"], 1.0)]
    two = [Task(values, numbers[name], 0.5) for name in numbers]
    assert covariance(two)[0, 0] == pytest.approx(covariance(one)[0, 0], rel=1e-12)
    assert averages(two) == pytest.approx(averages(one), rel=1e-12)
    apart = number_tasks({"once": (50, None), "again": (50, None)})
    independent = [Task(values, apart[name], 0.5) for name in apart]
    assert covariance(independent)[0, 0] == pytest.approx(covariance(one)[0, 0] / 2, rel=1e-12)


def test_tasks_of_equal_size_are_drawn_independently() -> None:
    values = RANDOM.choice([-1.0, 0.0, 1.0], (1, 200))
    numbers = number_tasks({"a": (200, None), "b": (200, None)})
    both = [Task(values, numbers["a"], 0.5), Task(values, numbers["b"], 0.5)]
    alone = resample([Task(values, numbers["a"], 1.0)])
    assert resample(both).std() == pytest.approx(alone.std() / np.sqrt(2), rel=0.06)


def test_a_task_of_one_group_leaves_the_variance_unknown() -> None:
    numbers = number_tasks({"a": (3, ["x", "x", "x"]), "b": (2, None)})
    drawn = [Task(np.ones((1, 3)), numbers["a"], 0.5), Task(np.array([[1.0, 0.0]]), numbers["b"], 0.5)]
    assert np.isinf(covariance(drawn)).all()


def test_weights_are_equal_unless_given() -> None:
    assert resolve_weights(["a", "b"], None) == {"a": 0.5, "b": 0.5}
    assert resolve_weights(["a", "b"], {"b": 0.25, "a": 0.75}) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize("weights", [{}, {"a": 1.0}, {"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}, {"a": 0.5, "c": 0.5}])
def test_other_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(DataError, match="Leave the weights out"):
        resolve_weights(["a", "b"], weights)


def test_no_task_has_no_average() -> None:
    with pytest.raises(DataError, match="at least one task"):
        resolve_weights([], None)
