"""A trial's values are decided once; the file that says so survives kills, and any number of readers."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import TrialState

from kdctl.sweep.space import Sweep, read_sweep
from kdctl.sweep.study import Study, grid, random_values


@pytest.fixture
def bayes(tmp_path: Path) -> Sweep:
    """Return a sweep whose trials are chosen after seeing earlier ones."""
    entries: dict[str, Any] = {"beta": {"min": 0.0, "max": 1.0}, "lmbda": {"values": [0, 1]}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"method": "bayes", "parameters": entries}, sort_keys=False))
    return read_sweep(str(path))


def test_a_slot_gets_its_values_once_whoever_asks(tmp_path: Path, bayes: Sweep) -> None:
    first = Study(tmp_path / "journal.log", "a", bayes)
    given = first.values(first.begin(3, None))
    second = Study(tmp_path / "journal.log", "a", bayes)
    assert second.values(second.begin(3, None)) == given
    assert set(given) == {"distill.beta", "distill.lmbda"}
    assert given["distill.lmbda"] in (0, 1)
    assert set(second.trials()) == {3}


def test_a_result_is_entered_once(tmp_path: Path, bayes: Sweep) -> None:
    study = Study(tmp_path / "journal.log", "a", bayes)
    study.finish(study.begin(0, None), 0.25)
    study.finish(study.begin(0, None), 0.5)
    assert [(t.state, t.value) for t in study.trials().values()] == [(TrialState.COMPLETE, 0.25)]


def test_a_failed_trial_is_tried_again_with_its_values(tmp_path: Path, bayes: Sweep) -> None:
    study = Study(tmp_path / "journal.log", "a", bayes)
    trial = study.begin(0, None)
    study.fail(trial)
    assert study.trials()[0].state == TrialState.FAIL
    again = study.begin(0, None)
    assert (again.state, study.values(again)) == (TrialState.RUNNING, study.values(trial))
    study.finish(again, 1.0)
    assert study.trials()[0].value == 1.0


def test_values_that_are_known_come_back_as_they_were(tmp_path: Path, bayes: Sweep) -> None:
    study = Study(tmp_path / "journal.log", "a", bayes)
    values = {"distill.beta": 0.125, "distill.lmbda": 1}
    assert study.values(study.begin(0, values)) == values
    lists = {"lora_targets": {"values": [["*.q_proj"], ["*.k_proj", "*.v_proj"]]}, "lora_alpha": {"values": [None, 2]}}
    (tmp_path / "lists.yaml").write_text(yaml.safe_dump({"method": "grid", "parameters": lists}, sort_keys=False))
    sweep = read_sweep(str(tmp_path / "lists.yaml"))
    other = Study(tmp_path / "journal.log", "b", sweep)
    points = list(grid(sweep))
    assert len(points) == 4
    assert [other.values(other.begin(slot, point)) for slot, point in enumerate(points)] == points


def test_bayes_learns_from_what_came_before(tmp_path: Path, bayes: Sweep) -> None:
    study = Study(tmp_path / "journal.log", "a", bayes)
    for slot in range(40):
        trial = study.begin(slot, None)
        study.finish(trial, abs(study.values(trial)["distill.beta"] - 0.75))
    values = [study.values(study.trials()[slot])["distill.beta"] for slot in range(40)]
    early, late = (sum(abs(value - 0.75) for value in part) / 10 for part in (values[:10], values[30:]))
    assert late < early / 2


@pytest.mark.parametrize("torn", ['{"op_code":4,"worker', '{"op_code":4}', "x"])
def test_a_line_that_a_full_disk_cut_off_does_no_harm(tmp_path: Path, bayes: Sweep, torn: str) -> None:
    path = tmp_path / "journal.log"
    study = Study(path, "a", bayes)
    study.finish(study.begin(0, None), 0.5)
    with open(path, "a") as file:
        file.write(torn)
    again = Study(path, "a", bayes)
    again.finish(again.begin(1, None), 0.25)
    assert {slot: trial.value for slot, trial in Study(path, "a", bayes).trials().items()} == {0: 0.5, 1: 0.25}


def test_another_sweep_in_the_same_file_is_another_study(tmp_path: Path, bayes: Sweep) -> None:
    study = Study(tmp_path / "journal.log", "a", bayes)
    study.begin(0, None)
    assert Study(tmp_path / "journal.log", "b", bayes).trials() == {}


def test_six_digits_never_leave_the_bounds(tmp_path: Path) -> None:
    space = {"lr": {"min": 0.123456789, "max": 0.1234567891}}
    (tmp_path / "narrow.yaml").write_text(yaml.safe_dump({"method": "random", "parameters": space}))
    sweep = read_sweep(str(tmp_path / "narrow.yaml"))
    values = random_values(sweep, 0)
    assert 0.123456789 <= values["distill.lr"] <= 0.1234567891
    study = Study(tmp_path / "journal.log", "a", sweep)
    assert study.values(study.begin(0, values)) == values
