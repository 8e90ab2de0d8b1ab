"""Figures say what the statistics found, and only those that can be filled are made."""

from pathlib import Path

from made_up import answers, evaluated, make_run

from kdctl.report.charts import Entry, Forest, Mark, Planes, mark
from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts, Row, baseline, differs, per_token_difference
from kdctl.report.details import recovery_of, removed
from kdctl.report.figures import accuracies, figures, grid, recoveries, verdicts, writers
from kdctl.report.marks import accuracy_mark, short
from kdctl.report.study import Model, Score, Settings, Study
from kdctl.report.study_reader import read_study
from kdctl.run.measures import FORWARD_KL


def entries(chart: Forest | None, panel: int = 0) -> dict[str, Entry]:
    assert chart is not None
    return {entry.label: entry for entry in chart.panels[panel].entries}


def single(results: Results, name: str) -> Row:
    return Row(name, (next(model for model in results.study.models if model.name == name),))


def test_a_full_study_fills_every_figure(full: Results) -> None:
    names = [chart.name for chart in figures(full)]
    first = ["minutes", "verdicts", "changes"]
    assert names == [*first, "accuracy", "learning-rate", "grid", "training", "writers", "recovery", "cost"]


def test_a_bare_study_fills_none(bare: Results) -> None:
    assert figures(bare) == []


def test_one_variant_fills_no_sweep(tmp_path: Path) -> None:
    results = Results(read_study([make_run(tmp_path / "run", {"v": {"steps": 2}})]), Contrasts(0.005))
    assert [chart.name for chart in figures(results)] == [
        "minutes",
        "verdicts",
        "accuracy",
        "training",
        "recovery",
        "cost",
    ]


def test_published_numbers_without_items_are_points_without_intervals() -> None:
    settings = [Settings(lmbda=1.0, beta=0.0, lr=lr) for lr in (1e-5, 1e-4)]
    swept = [Model(f"v{one.lr}", "variant", one, {"a": Score(0.6, 0.01)}, train_loss=0.2) for one in settings]
    results = Results(Study((Model("T", "teacher", scores={"a": Score(0.7)}), *swept)), Contrasts(0.005))
    accuracy, rates = figures(results)
    assert isinstance(accuracy, Forest)
    assert isinstance(rates, Planes)
    assert [entry.marks for entry in accuracy.panels[0].entries if entry.marks] == [(Mark(70.0),), *[(Mark(60.0),)] * 2]
    assert [row[0].y_label for row in rates.rows] == ["accuracy, %", "training loss, nats/token"]
    assert [point.y for point in rates.rows[0][0].series[0].points] == [Mark(60.0)] * 2


def test_accuracies_go_by_method_and_task(full: Results) -> None:
    chart = accuracies(full)
    assert chart is not None
    assert [panel.label for panel in chart.panels] == ["average of tasks, %", "alpha, %", "beta, %"]
    labels = [entry.label for entry in chart.panels[0].entries]
    assert labels[:4] == ["teacher", "ptq", "off-policy", "λ 0, β 0, lr 2e-05 (seeds 0, 1)"]
    assert all([entry.label for entry in panel.entries] == labels for panel in chart.panels)
    for panel, tasks in zip(chart.panels, (full.tasks, ("alpha",), ("beta",)), strict=True):
        marks = {entry.label: entry.marks for entry in panel.entries if entry.marks}
        assert marks == {short(row.name): (accuracy_mark(row, tasks),) for row in full.rows}
        assert panel.reference == marks["ptq"][0].value  # pyright: ignore[reportOptionalMemberAccess]


def test_the_grid_holds_paired_differences_and_marks_what_is_distinguishable(full: Results) -> None:
    chart = grid(full)
    assert chart is not None
    accuracy, kl = chart.maps
    assert (accuracy.columns, accuracy.rows) == (("0", "0.5", "1"), ("0", "1"))
    assert (accuracy.more_is_better, kl.more_is_better) == (True, False)
    rows = [row for row in full.rows if row.settings.lr == 2e-5]
    assert len(rows) == len(accuracy.cells) == len(kl.cells) == 6
    for row in rows:
        place = (accuracy.rows.index(f"{row.settings.beta:g}"), accuracy.columns.index(f"{row.settings.lmbda:g}"))
        judged, base = full.judged(row, "ptq", full.tasks), baseline(full.study, full.all_rows, row, "ptq")
        assert judged is not None
        assert base is not None
        assert accuracy.cells[place].mark == mark(judged.found.difference, 100)
        assert accuracy.cells[place].distinguishable == (judged.verdict in ("better", "worse"))
        difference = per_token_difference(base, row, FORWARD_KL)
        assert difference is not None
        assert kl.cells[place].mark == mark(difference)
        assert kl.cells[place].distinguishable == differs(difference)


def test_two_settings_that_vary_only_together_are_no_grid(tmp_path: Path) -> None:
    variants = {"a": {"lmbda": 0.0, "beta": 0.0}, "b": {"lmbda": 1.0, "beta": 1.0}}
    assert grid(Results(read_study([make_run(tmp_path / "run", variants)]), Contrasts(0.005))) is None


def test_who_wrote_the_text_is_told_apart_where_it_was_measured(full: Results, tmp_path: Path) -> None:
    chart = writers(full)
    assert chart is not None
    found = entries(chart)["ptq"].marks
    result = single(full, "ptq").models[0].result
    assert result is not None
    assert result.student_written is not None
    assert result.text_distribution is not None
    assert result.ptq_written is not None
    parts = (result.distribution, result.ptq_written, result.student_written, result.text_distribution)
    assert found == tuple(mark(part.forward_kl) for part in parts)
    assert entries(chart)["λ 1, β 1, lr 0.0001, seed 0"].marks[1:] == (None, None, None)
    assert writers(Results(read_study([make_run(tmp_path / "run", {})]), Contrasts(0.005))) is None


def test_recovery_is_fiellers_interval_and_kl_removed_its_bootstrap(full: Results) -> None:
    name = "lambda1_beta1_lr0.0001_seed0"
    row, found = single(full, name), recovery_of(full, single(full, name), full.tasks)
    base = baseline(full.study, full.all_rows, row, "ptq")
    assert found is not None
    assert found.estimate is not None
    assert base is not None
    share = removed(base, row)
    assert share is not None
    assert entries(recoveries(full))[short(name)].marks == (mark(found.estimate, 100),)
    assert entries(verdicts(full))[short(name)].marks == (mark(share, 100),)


def test_a_gap_within_noise_has_no_share(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": {}})
    evaluated(run, "teacher", {task: answers(0.6, 3) for task in ("alpha", "beta")}, kl=0.0)
    assert recoveries(Results(read_study([run]), Contrasts(0.005))) is None


def test_every_figure_says_what_its_intervals_are(full: Results) -> None:
    assert all("95 %" in chart.caption for chart in figures(full))
