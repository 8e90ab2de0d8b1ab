"""What figures share: names, methods, numbers with intervals, and which rows differ in what."""

from pathlib import Path

import numpy as np
import pytest
from made_up import answers, evaluated, make_run

from kdctl import stats
from kdctl.report.charts import Mark, mark
from kdctl.report.columns import Results, distance_cell
from kdctl.report.contrasts import Row, per_token, rows_of
from kdctl.report.marks import accuracy_mark, by_method, kl_mark, method_of, short, telling, values, varied
from kdctl.report.study import Model, Settings
from kdctl.report.study_reader import read_study
from kdctl.run.measures import FORWARD_KL


def row(name: str, **settings: float) -> Row:
    return Row(name, (Model(name, "variant", Settings(**settings)),))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lambda0.5_beta1_lr2e-05_seed0", "λ 0.5, β 1, lr 2e-05, seed 0"),
        ("a/lambda0_beta0_lr0.0001_seed1_steps9", "a/λ 0, β 0, lr 0.0001, seed 1_steps9"),
        ("lambda0_beta0_lr0.0001 (seeds 0, 1)", "λ 0, β 0, lr 0.0001 (seeds 0, 1)"),
        ("my lambda_seed1", "my lambda_seed1"),
    ],
)
def test_only_names_of_our_own_are_shortened(name: str, expected: str) -> None:
    assert short(name) == expected


def test_methods_follow_lambda_and_rows_their_settings(full: Results) -> None:
    named = {"off-policy": [0.0], "mixed": [0.5], "on-policy": [1.0]}
    groups = by_method(full.rows)
    assert [method for method, _ in groups] == ["teacher", "PTQ", "off-policy", "mixed", "on-policy"]
    for method, rows in groups[2:]:
        assert values(rows, "lmbda") == named[method]
        keys = [(one.settings.beta, one.settings.lr) for one in rows]
        assert keys == sorted(keys)
    assert method_of(Row("m", (Model("m", "foreign"),))) == "made elsewhere"


def test_an_accuracy_has_the_interval_of_the_statistics(full: Results) -> None:
    several = next(one for one in full.rows if len(one.models) > 1)
    for one in full.rows:
        found = {task: np.asarray(one.answers(task)) for task in full.tasks}
        average = stats.average_seeds(found, dict.fromkeys(found))[0]
        assert accuracy_mark(one, full.tasks) == mark(average, 100)
        if one is not several:
            assert accuracy_mark(one, ("alpha",)) == mark(stats.accuracy(found["alpha"][0]).estimate, 100)
    seeds = stats.average_seeds({"alpha": np.asarray(several.answers("alpha"))}, {"alpha": None})[0]
    assert accuracy_mark(several, ("alpha",)) == mark(seeds, 100)


def test_an_accuracy_without_items_has_no_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    evaluated(run, "ptq", {"alpha": answers(0.6)}, items=False)
    for path in run.eval("ptq").glob("samples/*"):
        path.unlink()
    ptq = rows_of(read_study([run]))[1]
    assert accuracy_mark(ptq, ("alpha",)) == Mark(100 * answers(0.6).mean())
    assert accuracy_mark(ptq, ("beta",)) is accuracy_mark(ptq, ()) is None


def test_kl_is_that_of_the_tables(full: Results) -> None:
    for one in full.rows[1:]:
        cell, estimate = distance_cell(one, FORWARD_KL), per_token(one, FORWARD_KL)
        assert estimate is not None
        assert kl_mark(one) == mark(estimate) == Mark(float(cell.value or 0), cell.low, cell.high)


def test_rows_vary_in_what_is_named_and_in_nothing_else(full: Results) -> None:
    (grid,) = varied(full.rows, ("lmbda", "beta"), ("max_new_tokens",))[:1]
    assert {one.settings.lr for one in grid} == {2e-5}
    assert len(grid) == 6
    sweeps = varied(full.rows, ("lr",))
    assert [[one.settings.lmbda for one in sweep] for sweep in sweeps] == [[0.0, 0.0], [1.0, 1.0]]
    assert all(values(sweep, "lr") == [2e-5, 1e-4] for sweep in sweeps)
    assert varied(full.rows, ("steps",)) == []


def test_rows_are_told_apart_by_settings_else_by_name() -> None:
    assert telling([row("a", lmbda=0.0, lr=1e-4), row("b", lmbda=1.0, lr=1e-4)], ()) == ["λ 0", "λ 1"]
    assert telling([row("a", lmbda=0.0), row("b", lmbda=1.0)], ("lmbda",)) == ["a", "b"]
    assert telling([row("a", lmbda=0.0)], ()) == [""]
