"""A trial's values are decided once; the file that says so survives kills, and any number of readers."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import TrialState

from kdctl.base.errors import StoreError
from kdctl.sweep.journal import Journal, grid, random_values
from kdctl.sweep.space import Sweep, read_sweep


@pytest.fixture
def bayes(tmp_path: Path) -> Sweep:
    """Return a sweep whose trials are chosen after seeing earlier ones."""
    entries: dict[str, Any] = {"beta": {"min": 0.0, "max": 1.0}, "lmbda": {"values": [0, 1]}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"method": "bayes", "parameters": entries}, sort_keys=False))
    return read_sweep(str(path))


def test_a_slot_gets_its_values_once_whoever_asks(tmp_path: Path, bayes: Sweep) -> None:
    first = Journal(tmp_path / "journal.log", "a", bayes)
    given = first.values(first.begin(3, None))
    second = Journal(tmp_path / "journal.log", "a", bayes)
    assert second.values(second.begin(3, None)) == given
    assert set(given) == {"distill.beta", "distill.lmbda"}
    assert given["distill.lmbda"] in (0, 1)
    assert set(second.trials()) == {3}


def test_a_result_is_entered_once(tmp_path: Path, bayes: Sweep) -> None:
    journal = Journal(tmp_path / "journal.log", "a", bayes)
    journal.finish(journal.begin(0, None), 0.25)
    journal.finish(journal.begin(0, None), 0.5)
    assert [(t.state, t.value) for t in journal.trials().values()] == [(TrialState.COMPLETE, 0.25)]


def test_a_failed_trial_is_tried_again_with_its_values(tmp_path: Path, bayes: Sweep) -> None:
    journal = Journal(tmp_path / "journal.log", "a", bayes)
    trial = journal.begin(0, None)
    journal.fail(trial)
    assert journal.trials()[0].state == TrialState.FAIL
    again = journal.begin(0, None)
    assert (again.state, journal.values(again)) == (TrialState.RUNNING, journal.values(trial))
    journal.finish(again, 1.0)
    assert journal.trials()[0].value == 1.0


def test_values_that_are_known_come_back_as_they_were(tmp_path: Path, bayes: Sweep) -> None:
    journal = Journal(tmp_path / "journal.log", "a", bayes)
    values = {"distill.beta": 0.125, "distill.lmbda": 1}
    assert journal.values(journal.begin(0, values)) == values
    lists = {"lora_targets": {"values": [["*.q_proj"], ["*.k_proj", "*.v_proj"]]}, "lora_alpha": {"values": [None, 2]}}
    (tmp_path / "lists.yaml").write_text(yaml.safe_dump({"method": "grid", "parameters": lists}, sort_keys=False))
    sweep = read_sweep(str(tmp_path / "lists.yaml"))
    other = Journal(tmp_path / "journal.log", "b", sweep)
    points = list(grid(sweep))
    assert len(points) == 4
    assert [other.values(other.begin(slot, point)) for slot, point in enumerate(points)] == points


def test_bayes_learns_from_what_came_before(tmp_path: Path, bayes: Sweep) -> None:
    journal = Journal(tmp_path / "journal.log", "a", bayes)
    for slot in range(40):
        trial = journal.begin(slot, None)
        journal.finish(trial, abs(journal.values(trial)["distill.beta"] - 0.75))
    values = [journal.values(journal.trials()[slot])["distill.beta"] for slot in range(40)]
    early, late = (sum(abs(value - 0.75) for value in part) / 10 for part in (values[:10], values[30:]))
    assert late < early / 2


@pytest.mark.parametrize("torn", ['{"op_code":4,"worker', '{"op_code":4}', "x"])
def test_a_line_that_a_full_disk_cut_off_does_no_harm(tmp_path: Path, bayes: Sweep, torn: str) -> None:
    path = tmp_path / "journal.log"
    journal = Journal(path, "a", bayes)
    journal.finish(journal.begin(0, None), 0.5)
    with open(path, "a") as file:
        file.write(torn)
    again = Journal(path, "a", bayes)
    again.finish(again.begin(1, None), 0.25)
    assert {slot: trial.value for slot, trial in Journal(path, "a", bayes).trials().items()} == {0: 0.5, 1: 0.25}


def test_another_sweep_in_the_same_file_is_another_study(tmp_path: Path, bayes: Sweep) -> None:
    journal = Journal(tmp_path / "journal.log", "a", bayes)
    journal.begin(0, None)
    assert Journal(tmp_path / "journal.log", "b", bayes).trials() == {}


def test_six_digits_never_leave_the_bounds(tmp_path: Path) -> None:
    space = {"lr": {"min": 0.123456789, "max": 0.1234567891}}
    (tmp_path / "narrow.yaml").write_text(yaml.safe_dump({"method": "random", "parameters": space}))
    sweep = read_sweep(str(tmp_path / "narrow.yaml"))
    values = random_values(sweep, 0)
    assert 0.123456789 <= values["distill.lr"] <= 0.1234567891
    journal = Journal(tmp_path / "journal.log", "a", sweep)
    assert journal.values(journal.begin(0, values)) == values


def scored(tmp_path: Path, metric: dict[str, Any], **more: Any) -> Journal:
    """Open the journal of a sweep with a metric."""
    file = {"method": "random", "parameters": {"beta": {"min": 0.0, "max": 1.0}}, "metric": metric, **more}
    (tmp_path / "scored.yaml").write_text(yaml.safe_dump(file))
    return Journal(tmp_path / "journal.log", "a", read_sweep(str(tmp_path / "scored.yaml")))


@pytest.mark.parametrize(("goal", "worse", "good"), [("minimize", 0.6, 0.5), ("maximize", 0.4, 0.5)])
def test_a_target_is_reached_by_a_finished_trial_that_is_as_good(
    tmp_path: Path, goal: str, worse: float, good: float
) -> None:
    journal = scored(tmp_path, {"name": "eval/forward_kl", "goal": goal, "target": 0.5})
    journal.fail(journal.begin(0, None))
    journal.finish(journal.begin(1, None), worse)
    assert not journal.reached()
    journal.finish(journal.begin(2, None), good)
    assert journal.reached()


def test_without_a_target_none_is_reached(tmp_path: Path) -> None:
    journal = scored(tmp_path, {"name": "eval/forward_kl", "goal": "minimize"})
    journal.finish(journal.begin(0, None), -1e9)
    assert not journal.reached()


@pytest.mark.parametrize(("goal", "sign"), [("minimize", 1), ("maximize", -1)])
def test_at_every_bracket_the_better_half_goes_on(tmp_path: Path, goal: str, sign: int) -> None:
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    journal = scored(tmp_path, {"name": "eval/forward_kl", "goal": goal}, early_terminate=early)
    trials = [journal.begin(slot, None) for slot in range(4)]
    for trial, value in zip(trials, (1, 4, 2, 3), strict=True):
        assert not journal.falls_behind(trial, 1, sign * value)
    behind = [journal.falls_behind(trial, 2, sign * value) for trial, value in zip(trials, (1, 4, 2, 3), strict=True)]
    assert behind == [False, True, True, True]
    assert not journal.falls_behind(trials[0], 3, sign * 9.0)
    journal.stop(trials[1])
    again = scored(tmp_path, {"name": "eval/forward_kl", "goal": goal}, early_terminate=early)
    assert [again.stopped(again.begin(slot, None)) for slot in range(4)] == [False, True, False, False]
    assert not again.reached()
    again.finish(again.begin(0, None), sign * 1.0)
    assert not again.falls_behind(again.begin(0, None), 4, sign * 9.0)  # trained again, because its folder was removed


def test_a_flipped_bit_or_a_lost_line_of_the_journal_is_noticed(tmp_path: Path, bayes: Sweep) -> None:
    path = tmp_path / "journal.log"
    journal = Journal(path, "s", bayes)
    for slot in range(2):
        journal.finish(journal.begin(slot, None), 0.5)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    flipped = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in range(0, len(whole) - 1, 97)]
    for data in [*flipped, b"".join(lines[1:]), b"".join([*lines[:1], *lines[2:]]), b"".join(reversed(lines))]:
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"journal\.log is damaged"):
            Journal(path, "s", bayes).trials()


def test_a_journal_without_checksums_is_gone_on_with(tmp_path: Path, bayes: Sweep) -> None:
    path = tmp_path / "journal.log"
    journal = Journal(path, "s", bayes)
    journal.finish(journal.begin(0, None), 0.5)
    path.write_bytes(re.sub(rb',"sum":"[0-9a-f]{8}"}', b"}", path.read_bytes()))
    journal = Journal(path, "s", bayes)
    journal.finish(journal.begin(1, None), 0.25)
    assert [trial.value for trial in Journal(path, "s", bayes).trials().values()] == [0.5, 0.25]
