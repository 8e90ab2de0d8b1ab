"""Result columns: errors, marks of what differs, and bold only where the best can be told from the others."""

from pathlib import Path

import numpy as np
import pytest
from made_up import answers, distilled, evaluated, flipped, make_run

from kdctl import stats
from kdctl.report.columns import TIED, Results, accuracy_cell
from kdctl.report.contrasts import Contrasts
from kdctl.report.study import Model, Score, Study
from kdctl.report.study_reader import read_study
from kdctl.report.tables import Cell

BASE = answers(0.6, items=2000)


def results_of(tmp_path: Path, variants: dict[str, np.ndarray], kl: dict[str, float] | None = None) -> Results:
    """Make a study of one task whose PTQ student answers BASE."""
    run = make_run(tmp_path / "run", {}, ["alpha"])
    evaluated(run, "teacher", {"alpha": flipped(BASE, 0, 300)}, kl=0.0)
    evaluated(run, "ptq", {"alpha": BASE}, kl=0.4)
    for index, (name, correct) in enumerate(variants.items()):
        distilled(run, name, 0.2, lr=1e-5 * (index + 1))
        evaluated(run, name, {"alpha": correct}, kl=(kl or {}).get(name, 0.2))
    return Results(read_study([run]), Contrasts(0.005))


def column(results: Results, key: str = "alpha") -> dict[str, Cell]:
    scale = next(one for one in results.scales if one.key == key)
    return dict(results.ranked(results.rows, scale))


def test_errors_are_those_of_the_items(tmp_path: Path) -> None:
    cell = column(results_of(tmp_path, {}))["ptq"]
    assert cell.value == BASE.mean()
    assert cell.error == pytest.approx(stats.accuracy(BASE).standard_error)


def test_marks_say_what_differs_from_which_baseline(tmp_path: Path) -> None:
    cells = column(results_of(tmp_path, {"up": flipped(BASE, 0, 300), "down": flipped(BASE, 90, 0), "same": BASE}))
    assert cells["ptq"].marks[:1] == ("T↓",)
    assert cells["up"].marks[:2] == ("P↑", "T=")
    assert cells["down"].marks[:2] == ("P↓", "T↓")
    assert cells["same"].marks[:2] == ("P=", "T↓")
    assert cells["teacher"].marks == ()


def test_a_best_that_can_be_told_from_all_others_is_bold(tmp_path: Path) -> None:
    cells = column(results_of(tmp_path, {"up": flipped(BASE, 0, 300), "less": flipped(BASE, 0, 100)}))
    assert [name for name, cell in cells.items() if cell.bold] == ["up"]
    assert not any(TIED in cell.marks for cell in cells.values())


def test_bests_that_cannot_be_told_apart_are_marked_as_tied_and_none_is_bold(tmp_path: Path) -> None:
    cells = column(results_of(tmp_path, {"one": flipped(BASE, 0, 300), "two": flipped(BASE, 4, 300)}))
    assert [name for name, cell in cells.items() if TIED in cell.marks] == ["one", "two"]
    assert not any(cell.bold for cell in cells.values())


def test_the_teacher_does_not_compete(tmp_path: Path) -> None:
    cells = column(results_of(tmp_path, {}))
    assert not any(cell.bold or TIED in cell.marks for cell in cells.values())


def test_the_smallest_distance_is_the_best(tmp_path: Path) -> None:
    found = results_of(tmp_path, {"near": BASE, "far": BASE}, {"near": 0.1, "far": 0.3})
    cells = column(found, "forward_kl")
    assert [name for name, cell in cells.items() if cell.bold] == ["near"]
    assert cells["near"].marks == ("P↑",)
    assert cells["teacher"].value is None
    assert column(found, "perplexity")["near"].bold


def test_facts_alone_are_neither_marked_nor_bold() -> None:
    models = [Model(name, "variant", scores={"alpha": Score(value)}) for name, value in (("a", 0.9), ("b", 0.1))]
    results = Results(Study((Model("T", "teacher", scores={"alpha": Score(1.0)}), *models)), Contrasts(0.005))
    assert column(results)["a"] == Cell(0.9)
    assert results.averages == results.single == {}


def test_reported_errors_are_used_where_items_are_not_kept() -> None:
    model = Model("a", "variant", scores={"alpha": Score(0.5, 0.03), "beta": Score(0.7, 0.04)})
    row = Results(Study((model,)), Contrasts(0.005)).rows[0]
    assert accuracy_cell(row, ["alpha", "beta"]) == Cell(pytest.approx(0.6), pytest.approx(0.025))  # type: ignore
    assert accuracy_cell(row, ["alpha", "gamma"]) == Cell()
