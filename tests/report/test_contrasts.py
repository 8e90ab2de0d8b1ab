"""Rows and their differences: what is paired with what, seeds, and Holm's correction."""

from pathlib import Path

import numpy as np
import pytest
from made_up import answers, evaluated, make_run

from kdctl import stats
from kdctl.report.contrasts import Contrasts, baseline, differs, judge, per_token, per_token_difference, rows_of
from kdctl.report.study_reader import read_study
from kdctl.run.measures import FORWARD_KL
from kdctl.stats import Paired
from kdctl.stats.findings import Comparison, SeedComparison

SEEDS = {f"v_seed{seed}": {"seed": seed, "draw": seed, "kl": 0.2 + 0.01 * seed} for seed in range(3)}


def test_one_seed_is_compared_as_the_statistics_do(tmp_path: Path) -> None:
    study = read_study([make_run(tmp_path / "run", {"v": {}})])
    _, ptq, row = rows_of(study)
    assert baseline(study, rows_of(study), row, "ptq") == ptq
    found = Contrasts(0.01).over(ptq, row, ["alpha", "beta"])
    pair = Paired(answers(0.6, 1), answers(0.7, 2))
    assert found == stats.compare_average({"alpha": pair, "beta": pair}, margin=0.01)
    assert isinstance(found, Comparison)


def test_subjects_are_clusters_of_their_own_task(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    for name, share, kl in (("teacher", 0.8, 0.0), ("ptq", 0.6, 0.4)):
        evaluated(run, name, {task: answers(share) for task in ("alpha", "beta")}, kl=kl, subjects=5)
    teacher, ptq = rows_of(read_study([run]))
    assert set(ptq.clusters("alpha") or ()) == {f"alpha/alpha_{subject}" for subject in range(5)}
    found = Contrasts(0.005).over(teacher, ptq, ["alpha", "beta"])
    assert isinstance(found, Comparison)
    assert found.groups == 10


def test_several_seeds_are_one_row_with_both_variances(tmp_path: Path) -> None:
    _, ptq, row = rows_of(read_study([make_run(tmp_path / "run", SEEDS)]))
    assert (row.name, row.settings.seed) == ("v (seeds 0, 1, 2)", None)
    found = Contrasts(0.005).over(ptq, row, ["alpha", "beta"])
    assert isinstance(found, SeedComparison)
    assert found.seeds == (1, 3)
    assert "one seed" not in found.words
    kl = per_token(row, FORWARD_KL)
    assert kl is not None
    alone = per_token(type(row)("one", row.models[1:2]), FORWARD_KL)
    assert alone is not None
    assert kl.value == pytest.approx(alone.value)
    assert kl.high - kl.low > alone.high - alone.low


def test_the_same_seed_in_two_folders_is_no_other_seed(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, {"v_seed0": {"seed": 0}}) for name in ("a", "b")]
    assert [row.name for row in rows_of(read_study(folders))][2:] == ["a/v_seed0", "b/v_seed0"]


def test_seeds_from_joined_folders_are_one_row_of_a_name_of_its_own(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, {f"v_seed{seed}": {"seed": seed}}) for seed, name in enumerate("ab")]
    folders.append(make_run(tmp_path / "c", {f"v_seed{seed}": {"seed": seed} for seed in (0, 1)}))
    names = [row.name for row in rows_of(read_study(folders))][2:]
    assert names == ["a/v_seed0 + b/v_seed1 (seeds 0, 1)", "c/v (seeds 0, 1)"]
    assert [row.name for row in rows_of(read_study(folders[:2]))][2:] == ["v (seeds 0, 1)"]


def test_distances_are_paired_over_documents(tmp_path: Path) -> None:
    _, ptq, row = rows_of(read_study([make_run(tmp_path / "run", {"v": {"kl": 0.3}})]))
    before, after = per_token(ptq, FORWARD_KL), per_token(row, FORWARD_KL)
    found = per_token_difference(ptq, row, FORWARD_KL)
    assert before is not None
    assert after is not None
    assert found is not None
    assert found.value == pytest.approx(after.value - before.value)
    assert found.high - found.low < before.high - before.low
    assert differs(found)


def test_what_has_no_items_is_not_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    for path in run.eval("ptq").glob("samples/*"):
        path.unlink()
    teacher, ptq = rows_of(read_study([run]))
    contrasts = Contrasts(0.005)
    assert contrasts.over(teacher, ptq, ["alpha"]) is contrasts.over(teacher, ptq, []) is None
    assert per_token(ptq, FORWARD_KL) is not None  # the student folder keeps its own documents


def test_corrected_verdicts_never_say_more(tmp_path: Path) -> None:
    base = answers(0.6)
    shaky = base.copy()
    shaky[np.flatnonzero(~base)[:9]] = True
    shaky[np.flatnonzero(base)[:1]] = False
    found = stats.compare(Paired(base, shaky))
    assert found.verdict == "better"
    alone = judge({("one",): found})[("one",)]
    assert (alone.verdict, alone.words, alone.family) == (found.verdict, found.words, 1)
    nothing = stats.compare(Paired(base, base))
    family = judge({("one",): found, **{(str(index),): nothing for index in range(9)}, ("absent",): None})
    among = family[("one",)]
    assert (among.verdict, among.family, len(family)) == ("cannot tell", 10, 10)
    assert among.p_holm == pytest.approx(10 * found.p)
    assert "as one of 10 comparisons" in among.words
