"""Sentences: they say what the numbers say, and what cannot be said."""

from pathlib import Path

from made_up import answers, distilled, evaluated, make_run, quantized

from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.study_reader import read_study
from kdctl.report.verdicts import sentences
from kdctl.run.paths import RunDir


def said(run: RunDir, margin: float = 0.005) -> dict[str, str]:
    """Return each row's paragraph."""
    found = sentences(Results(read_study([run]), Contrasts(margin)))
    return dict(text.removeprefix("**").split("**: ", 1) for text in found)


def test_the_teacher_is_not_judged_and_every_student_is(tmp_path: Path) -> None:
    found = said(make_run(tmp_path / "run", {"v": {"share": 0.75, "kl": 0.1}}))
    assert list(found) == ["ptq", "v"]
    assert "against the teacher, worse by" in found["ptq"]
    assert "against the PTQ student, better by" in found["v"]
    assert "(single tasks: better on alpha, better on beta)" in found["v"]
    assert "75 % [75, 75] of it was removed" in found["v"]
    assert "came back" in found["v"]


def test_equal_answers_are_equivalent_within_a_margin_that_can_be_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": {"share": 0.6, "draw": 1, "kl": 0.4}})
    assert "against the PTQ student, cannot tell: this comparison could only see" in said(run)["v"]
    found = said(run, margin=0.05)["v"]
    assert "against the PTQ student, equivalent within ±5 points" in found
    assert "not distinguishable from the PTQ student's" in found


def test_more_distance_is_called_more(tmp_path: Path) -> None:
    assert "more than the PTQ student's" in said(make_run(tmp_path / "run", {"v": {"kl": 0.8}}))["v"]


def test_without_items_nothing_is_concluded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": {}})
    (run.eval("v") / "samples" / "beta.parquet").unlink()
    found = said(run)["v"]
    assert "against the PTQ student, nothing can be concluded, without per-item results of beta" in found
    assert "came back" not in found


def test_before_any_evaluation_there_is_the_distance(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    quantized(run.student, 0.4)
    distilled(run, "v", 0.1)
    found = said(run)["v"]
    assert found.startswith("Not evaluated on any task yet")
    assert "75 % [75, 75] of it was removed" in found


def test_a_student_alone_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    evaluated(run, "ptq", {"alpha": answers(0.6)})
    assert "nothing to compare it with" in said(run)["ptq"]
