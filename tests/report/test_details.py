"""The tables behind the verdicts: flips, distances, recovery and seeds."""

from pathlib import Path

import pytest
from made_up import answers, evaluated, flipped, make_run

from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.details import comparisons, detail_tables, distances, recoveries, spreads
from kdctl.report.study_reader import read_study
from kdctl.report.tables import records

SEEDS = {f"v_seed{seed}": {"seed": seed, "draw": seed} for seed in range(3)}


def results_of(tmp_path: Path, variants: dict) -> Results:
    return Results(read_study([make_run(tmp_path / "run", variants)]), Contrasts(0.005))


def test_every_student_is_compared_with_each_baseline_on_average_and_tasks(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"v": {}})
    evaluated(results.study.sources[0].run, "v", {"alpha": answers(0.7), "beta": answers(0.7)}, kl=0.2)
    rows = records(comparisons(results))
    assert [(row["model"], row["baseline"], row["task"]) for row in rows] == [
        (model, against, task)
        for model, against in (("ptq", "teacher"), ("v", "PTQ"), ("v", "teacher"))
        for task in ("average", "alpha", "beta")
    ]
    assert all(row["p_holm"] is not None for row in rows)


def test_flips_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": {}}, ["alpha"])
    evaluated(run, "v", {"alpha": flipped(answers(0.6, 1), 7, 13)}, kl=0.2)
    row = records(comparisons(Results(read_study([run]), Contrasts(0.005))))[1]
    assert (row["harmful"], row["beneficial"], row["flip_rate"]) == (7, 13, 0.1)
    assert row["difference"] == pytest.approx(6 / 200)


def test_single_seeds_stand_below_their_setting_without_a_verdict(tmp_path: Path) -> None:
    rows = [row for row in records(comparisons(results_of(tmp_path, SEEDS))) if row["baseline"] == "PTQ"]
    assert [row["model"] for row in rows[:4]] == ["v (seeds 0, 1, 2)", "v_seed0", "v_seed1", "v_seed2"]
    assert [row["harmful"] is None for row in rows[:4]] == [True, False, False, False]
    assert [row["p_holm"] is None for row in rows[:4]] == [False, True, True, True]
    mean = sum(float(row["difference"] or 0) for row in rows[1:4]) / 3
    assert rows[0]["difference"] == pytest.approx(mean)


def test_distances_and_what_was_removed(tmp_path: Path) -> None:
    (row,) = records(distances(results_of(tmp_path, {"v": {"kl": 0.1}})))
    assert row["removed"] == pytest.approx(0.75)
    assert float(row["forward_kl_difference"] or 0) < 0


def test_recovery_is_the_share_of_the_gap(tmp_path: Path) -> None:
    rows = records(recoveries(results_of(tmp_path, {"v": {"share": 0.7}})))
    student, ptq, teacher = (float(answers(*drawn).mean()) for drawn in ((0.7, 2), (0.6, 1), (0.8, 0)))
    expected = (student - ptq) / (teacher - ptq)
    assert [row["recovery"] for row in rows] == pytest.approx([expected] * 3)
    assert float(rows[0]["recovery_low"] or 0) < expected < float(rows[0]["recovery_high"] or 0)


def test_there_is_no_share_of_a_gap_within_noise(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": {}})
    evaluated(run, "ptq", {task: answers(0.8, 5) for task in ("alpha", "beta")}, kl=0.4)
    rows = records(recoveries(Results(read_study([run]), Contrasts(0.005))))
    assert all(row["recovery"] is None and "within noise" in str(row["reason"]) for row in rows)


def test_spreads_are_there_for_several_seeds_only(tmp_path: Path) -> None:
    results = results_of(tmp_path, SEEDS)
    rows = records(spreads(results))
    assert [(row["task"], row["seeds"]) for row in rows] == [("alpha", 3), ("beta", 3)]
    assert [table.name for table in detail_tables(results)] == ["comparisons", "distances", "recovery", "seeds"]
    alone = results_of(tmp_path / "alone", {"v": {}})
    assert [table.name for table in detail_tables(alone)] == ["comparisons", "distances", "recovery"]
