"""Which documents are asked, that estimates stay unbiased, and that intervals cover as they say."""

import copy

import numpy as np
import pyarrow as pa
import pytest
import torch

from kdctl import stats
from kdctl.config.preset import EvalSection
from kdctl.eval.allocation import allocate
from kdctl.eval.tasks import build_tasks, score_tasks
from kdctl.run.documents import item_values, right_bits
from kdctl.run.measures import ACCURACY, NORMALIZED_ACCURACY, P_RIGHT

MARGIN = EvalSection(allocation="margin", near=0.4, far=0.1)
TASKS = ("arc_easy_offline", "lambada_offline")


def table_of(margins: np.ndarray, right: np.ndarray) -> pa.Table:
    """Make a teacher's table: choices 0 and 1 are that far apart, the likelier one right or wrong."""
    said = [[-1.0, -1.0 - margin] for margin in margins]
    return pa.table(
        {
            "item_id": [f"{number:05d}" for number in range(len(margins))],
            "loglikelihoods": pa.array(said, pa.list_(pa.float64())),
            "lengths": pa.array([[1, 1]] * len(margins), pa.list_(pa.int32())),
            "gold": np.where(right, 0, 1),
        }
    )


def students(table: pa.Table, flipped: np.ndarray) -> pa.Table:
    """Make a student's table: where it is flipped, the two choices are the other way round."""
    said = [one[::-1] if flip else one for one, flip in zip(table["loglikelihoods"].to_pylist(), flipped, strict=True)]
    return table.set_column(1, "loglikelihoods", pa.array(said, pa.list_(pa.float64())))


def population(seed: int, count: int) -> tuple[pa.Table, list[pa.Table], np.ndarray]:
    """Draw documents and two students that flip the more often the smaller the margin, the second half as often."""
    drawn = np.random.default_rng(seed)
    margins, right = drawn.exponential(1.0, count), drawn.random(count) < 0.6
    table = table_of(margins, right)
    chance = 0.25 * np.exp(-margins / 0.3) + 0.004
    flips = [drawn.random(count) < part * chance * np.where(right, 1.0, 0.7) for part in (1.0, 0.5)]
    return table, [students(table, flip) for flip in flips], margins


def test_small_margins_are_all_asked_and_the_others_count_for_several() -> None:
    table, _, margins = population(0, 500)
    found = allocate(table, "acc", MARGIN)
    assert found is not None
    order = np.argsort(margins)
    assert (found.weights[order[:200]] == 1).all()
    assert sorted(set(found.weights[order[200:]])) == [0, 10]
    assert found.weights.sum() == 500
    assert found.asked == 230
    assert np.array_equal(found.weights, allocate(table, "acc", MARGIN).weights)  # pyright: ignore
    other = allocate(table, "acc", MARGIN.model_copy(update={"seed": 1}))
    assert other is not None
    assert not np.array_equal(found.weights, other.weights)


def test_margins_are_by_the_headline() -> None:
    table = table_of(np.array([1.0, 2.0]), np.array([True, True]))
    table = table.set_column(2, "lengths", pa.array([[1, 1], [10, 10]], pa.list_(pa.int32())))
    for metric, near in (("acc", [True, False]), ("acc_norm", [False, True])):
        found = allocate(table, metric, EvalSection(allocation="margin", near=0.5, far=1e-9))
        assert found is not None
        assert list(found.weights == 1) == near or found.weights.tolist() == [1, 1]
    assert allocate(table.drop_columns("loglikelihoods"), "f1", MARGIN) is None


def estimate(table: pa.Table, student: pa.Table, seed: int) -> np.ndarray:
    found = allocate(table, "acc", MARGIN.model_copy(update={"seed": seed}))
    assert found is not None
    return item_values(found.noted(student), ACCURACY).astype(float)


def test_redrawn_estimates_have_the_mean_of_the_full_evaluation() -> None:
    table, (student, _), _ = population(3, 800)
    full = item_values(student, ACCURACY).mean()
    drawn = [estimate(table, student, seed).mean() for seed in range(400)]
    assert np.std(drawn) > 0
    assert abs(np.mean(drawn) - full) < 3 * np.std(drawn) / np.sqrt(len(drawn))


def test_measures_of_items_that_were_not_asked_are_the_teachers() -> None:
    table, (student, _), _ = population(4, 100)
    found = allocate(table, "acc", MARGIN)
    assert found is not None
    noted, left = found.noted(student), found.weights == 0
    for measure in (ACCURACY, NORMALIZED_ACCURACY, P_RIGHT):
        own, teachers = (item_values(one, measure).astype(float) for one in (student, table))
        expected = teachers + found.weights * (own - teachers)
        assert item_values(noted, measure).astype(float) == pytest.approx(expected)
        assert (item_values(noted, measure)[left] == teachers[left]).all()
    bits, sizes = right_bits(noted)
    assert bits[left] == pytest.approx(right_bits(table)[0][left])
    assert sizes.tolist() == right_bits(table)[1].tolist()


@pytest.mark.slow
def test_intervals_cover_the_true_difference() -> None:
    """Of new documents and new draws each time, 95 ± 1 % hold the truth; rare flips far off make them wider."""
    _, big, _ = population(10**6, 400_000)
    truth = item_values(big[1], ACCURACY).mean() - item_values(big[0], ACCURACY).mean()
    held, widths, rounds = 0, [], 1500
    for seed in range(rounds):
        table, both, _ = population(seed, 1000)
        first, second = (estimate(table, student, seed) for student in both)
        found = stats.compare_seeds([first], [second])
        held += found.difference.low <= truth <= found.difference.high
        if seed < 100:
            alone = [[item_values(student, ACCURACY)] for student in both]
            whole = stats.compare_seeds(alone[0], alone[1])
            widths.append(
                (found.difference.high - found.difference.low) / (whole.difference.high - whole.difference.low)
            )
    assert 0.94 <= held / rounds <= 0.96
    assert 1.0 <= np.mean(widths) < 1.5


@pytest.fixture(scope="module")
def tasks() -> dict:
    return build_tasks(EvalSection(tasks=TASKS), offline=True)


def test_a_student_is_asked_what_was_allocated(random_llama, byte_tokenizer, tasks) -> None:
    settings = EvalSection(tasks=TASKS, limit=20, batch_size=4, allocation="margin", near=0.3, far=0.2)
    student = copy.deepcopy(random_llama)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    _, tables = score_tasks(random_llama, byte_tokenizer, tasks, settings)
    _, full = score_tasks(student, byte_tokenizer, tasks, settings)
    name = TASKS[0]
    found = allocate(tables[name], "acc_norm", settings)
    assert found is not None
    read: list[int] = []
    hook = student.base_model.register_forward_pre_hook(
        lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True
    )
    scores, some = score_tasks(student, byte_tokenizer, {name: tasks[name]}, settings, allocations={name: found})
    hook.remove()
    assert scores[name].asked == found.asked == 9
    assert scores[name].items == 20
    for row, own, teachers, weight in zip(
        *(one[name].to_pylist() for one in (some, full, tables)), found.weights, strict=True
    ):
        assert row["item_id"] == own["item_id"] == teachers["item_id"]
        expected = own if weight else teachers
        assert row["loglikelihoods"] == pytest.approx(expected["loglikelihoods"], abs=1e-4)
        assert row["teacher_loglikelihoods"] == teachers["loglikelihoods"]
    assert scores[name].value == pytest.approx(item_values(some[name], NORMALIZED_ACCURACY).astype(float).mean())
    assert allocate(tables[TASKS[1]], "acc", settings) is None
