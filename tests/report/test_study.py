"""Models of a study: what is read of them, and when two may be compared."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from made_up import answers, evaluated, make_run

from kdctl.base.errors import DataError, StoreError
from kdctl.report.study import Model, Score, Settings, Study, differences, require_comparable
from kdctl.report.study_reader import read_study
from kdctl.run.files import sha256

TASKS = ("alpha", "beta")


def named(study: Study) -> dict[str, Model]:
    return {model.name: model for model in study.models}


def test_items_are_read_when_asked_for_and_say_what_the_score_says(tmp_path: Path) -> None:
    model = named(read_study([make_run(tmp_path / "run", {})]))["teacher"]
    items = model.items("alpha")
    assert items is not None
    assert items.values.mean() == model.scores["alpha"].value
    assert items.clusters is None
    assert model.items("alpha") is items
    assert model.items("gamma") is None


def test_subjects_are_clusters_and_items_are_ordered_by_id(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {}, ["alpha"])
    evaluated(run, "teacher", {"alpha": answers(0.5)}, subjects=7, kl=0.0)
    items = named(read_study([run]))["teacher"].items("alpha")
    assert items is not None
    assert items.clusters is not None
    assert len(set(items.clusters)) == 7
    assert np.array_equal(items.ids, np.sort(items.ids))
    assert np.array_equal(items.values, answers(0.5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "2"}, "alpha: version 1 and 2"),
        ({"num_fewshot": 5}, "alpha: num_fewshot 0 and 5"),
        ({"limit": 30}, "alpha: limit None and 30"),
        ({"prompt": "other"}, "alpha: 200 of 200 items were asked with another prompt"),
        ({"documents": 39}, "40 held-out documents and 39"),
    ],
)
def test_models_that_were_asked_otherwise_are_refused_by_name(tmp_path: Path, change: dict, words: str) -> None:
    run = make_run(tmp_path / "run", {})
    evaluated(run, "ptq", {task: answers(0.6) for task in TASKS}, **change)
    with pytest.raises(DataError, match=r"cannot be compared") as caught:
        read_study([run])
    assert f"teacher and ptq: {words}" in str(caught.value)


def test_every_difference_is_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": {}})
    evaluated(run, "v", {"alpha": answers(0.6, items=100), "beta": answers(0.6)}, version="2", limit=7)
    with pytest.raises(DataError) as caught:
        read_study([run])
    expected = ("alpha: version 1 and 2", "alpha: limit None and 7", "alpha: 200 items and 100", "beta: version 1")
    assert all(words in str(caught.value) for words in expected)


def test_a_model_without_a_task_or_without_items_is_no_obstacle(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    evaluated(run, "ptq", {"alpha": answers(0.6)}, items=False)
    for path in run.eval("ptq").glob("samples/*"):
        path.unlink()
    study = read_study([run])
    assert named(study)["ptq"].items("alpha") is None
    assert study.tasks == ["alpha", "beta"]


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    study = read_study([make_run(tmp_path / "run", {"v": {}})])
    assert all(differences(model, model) == [] for model in study.models)


def test_baselines_are_those_of_the_folder(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a", {"v": {}}), make_run(tmp_path / "b", {"w": {}})
    evaluated(second, "ptq", {task: answers(0.5) for task in TASKS}, kl=0.3, weights="another")
    models = named(study := read_study([first, second]))
    assert study.baseline(models["v"], "ptq") is models["a/ptq"]
    assert study.baseline(models["w"], "ptq") is models["b/ptq"]
    assert study.baseline(models["w"], "teacher") is models["teacher"]
    assert study.baseline(models["teacher"], "teacher") is None


def test_seeds_of_one_setting_are_one_group(tmp_path: Path) -> None:
    variants = {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"seed": 1, "lr": 1e-5}, "d": {"seed": 2, "keep_last": 2}}
    groups = read_study([make_run(tmp_path / "run", variants)]).settings_groups()
    assert [[model.name for model in group] for group in groups] == [["teacher"], ["ptq"], ["a", "b", "d"], ["c"]]


def test_a_study_can_be_made_of_facts_alone() -> None:
    teacher = Model("T", "teacher", scores={"alpha": Score(0.7)})
    variant = Model("V", "variant", Settings(lmbda=1.0), {"alpha": Score(0.6)})
    study = Study((teacher, variant))
    require_comparable(study)
    assert study.baseline(variant, "teacher") is teacher
    assert variant.items("alpha") is variant.documents is variant.distribution is None
    assert variant.curve == []


def test_settings_differ_by_key() -> None:
    one, other = Settings(lmbda=0.0, lr=1e-4), Settings(lmbda=1.0, lr=1e-4)
    assert one.key() != other.key()
    assert one.key("lmbda") == other.key("lmbda")


def test_scores_are_those_of_the_evaluation(tmp_path: Path) -> None:
    score = named(read_study([make_run(tmp_path / "run", {})]))["ptq"].scores["alpha"]
    assert (score.value, score.items) == (pytest.approx(answers(0.6, 1).mean()), 200)


def test_documents_of_a_student_that_its_sums_name_are_missed_where_they_are_gone(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"v": {}}, [])
    final = run.variant("v").final
    shutil.rmtree(run.eval("v"))
    (final / "SHA256SUMS").write_text(f"{sha256(final / 'heldout.parquet')}  heldout.parquet\n")
    assert named(read_study([run]))["v"].documents is not None
    (final / "heldout.parquet").unlink()
    with pytest.raises(StoreError, match=r"final/heldout\.parquet"):
        _ = named(read_study([run]))["v"].documents
