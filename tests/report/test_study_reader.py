"""Run folders to studies: which models there are, what made them, and how folders are joined."""

from pathlib import Path

import pytest
from made_up import TEACHER, answers, distilled, edit, evaluated, make_run, quantized, wrote_rollouts

from kdctl.base.errors import DataError, StoreError
from kdctl.report.study import Model
from kdctl.report.study_reader import read_study
from kdctl.run.paths import RunDir

TASKS = ("alpha", "beta")


def models(*folders: RunDir) -> dict[str, Model]:
    return {model.name: model for model in read_study(folders).models}


def test_rows_are_teacher_ptq_foreign_models_and_variants(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"zeta": {}, "alpha": {"seed": 1}})
    evaluated(run, "gguf", {"alpha": answers(0.5)}, reference="elsewhere")
    kinds = {name: model.kind for name, model in models(run).items()}
    assert list(kinds.items()) == [
        ("teacher", "teacher"),
        ("ptq", "ptq"),
        ("gguf", "foreign"),
        ("alpha", "variant"),
        ("zeta", "variant"),
    ]


def test_settings_are_those_of_the_training(tmp_path: Path) -> None:
    given = {"lmbda": 1.0, "beta": 0.5, "lr": 2e-5, "steps": 30, "micro_batch_size": 2, "gradient_accumulation": 4}
    run = make_run(tmp_path / "run", {"v": given | {"train": "lora", "lora_rank": 8}})
    wrote_rollouts(run.variant("v").rollouts, 77)
    found = models(run)["v"]
    settings = found.settings
    assert (settings.lmbda, settings.beta, settings.lr, settings.steps) == (1.0, 0.5, 2e-5, 30)
    assert (settings.batch_size, settings.max_new_tokens, settings.rank, settings.train) == (8, 77, 8, "lora")
    assert (settings.method, settings.grid) == ("hqq", "4 bits, group size 32, asymmetric")
    assert found.train_loss == pytest.approx((1 / 28 + 1 / 29 + 1 / 30) / 3)
    assert len(found.curve) == 30


def test_rollout_length_is_that_of_the_rollouts_that_were_used(tmp_path: Path) -> None:
    variants = {
        "live": {"lmbda": 1.0},
        "again": {"lmbda": 1.0, "replay": "live", "lr": 1.0},
        "replayed": {"lmbda": 1.0, "refresh_every": 0},
        "offline": {"lmbda": 0.0},
    }
    run = make_run(tmp_path / "run", variants)
    wrote_rollouts(run.variant("live").rollouts, 64)
    wrote_rollouts(run.rollouts("student"), 32)
    lengths = {name: model.settings.max_new_tokens for name, model in models(run).items()}
    assert lengths == {"teacher": None, "ptq": None, "live": 64, "again": 64, "replayed": 32, "offline": None}


def test_before_evaluation_rows_come_from_quantize_and_distill(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    quantized(run.student, 0.2)
    distilled(run, "v", 0.1)
    found = models(run)
    assert list(found) == ["ptq", "v"]
    assert [model.documents is not None for model in found.values()] == [True, True]
    assert found["v"].distribution is not None
    assert found["v"].distribution.forward_kl.value == 0.1


def test_an_unfinished_variant_has_no_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    quantized(run.variant("unfinished").final, 0.1)
    assert "unfinished" not in models(run)


@pytest.mark.parametrize("made", [False, True])
def test_an_empty_folder_is_refused(tmp_path: Path, made: bool) -> None:
    run = RunDir(tmp_path / "run")
    if made:
        run.prepare()
    with pytest.raises(StoreError, match="has no results yet" if made else "is no run folder"):
        read_study([run])
    assert run.path.exists() == made


def test_joined_folders_share_what_is_equal_and_prefix_what_clashes(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a", {"v": {}}), make_run(tmp_path / "b", {"v": {}, "w": {"seed": 1}})
    found = models(first, second)
    assert list(found) == ["teacher", "ptq", "a/v", "b/v", "w"]
    assert found["teacher"].folders == ("a", "b")


def test_folders_that_end_alike_are_named_in_full(tmp_path: Path) -> None:
    found = models(make_run(tmp_path / "a" / "run", {"v": {}}), make_run(tmp_path / "b" / "run", {"v": {}}))
    assert list(found)[2:] == [f"{tmp_path}/a/run/v", f"{tmp_path}/b/run/v"]


def test_a_folder_named_twice_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", {})
    with pytest.raises(DataError, match="named twice"):
        read_study([run, RunDir(tmp_path / "b" / ".." / "a")])


def test_folders_of_other_teachers_are_refused(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a", {}), make_run(tmp_path / "b", {})
    quantized(second.student, 0.4, teacher="u" * 64)
    evaluated(second, "ptq", {task: answers(0.6) for task in TASKS}, weights="other", kl=0.4)
    evaluated(second, "teacher", {task: answers(0.8) for task in TASKS}, weights="u" * 64, kl=0.0)
    with pytest.raises(DataError, match=f"a/teacher and b/teacher: teacher weights {TEACHER[:16]} and {'u' * 16}"):
        read_study([first, second])


def test_settings_of_another_version_and_damaged_items_are_refused_by_path(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": {}})
    path = run.variant("v").report
    edit(path, settings={"lambda": 1.0})
    with pytest.raises(StoreError, match=r"distill\.json is of another kdctl version"):
        read_study([run])
    run = make_run(tmp_path / "other", {})
    (run.eval("ptq") / "samples" / "alpha.parquet").write_bytes(b"no")
    with pytest.raises(StoreError, match=r"alpha\.parquet is damaged.*kdctl eval ptq .*--force"):
        read_study([run])
