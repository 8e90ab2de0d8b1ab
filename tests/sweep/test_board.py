"""Where a sweep stands is read from its folder."""

import json
from pathlib import Path

import pytest
import yaml

from kdctl.config.resolve import load_preset
from kdctl.run.files import write_text
from kdctl.run.record_files import write_record
from kdctl.sweep.board import Board, Follower, preview
from kdctl.sweep.plan import plan_sweep
from kdctl.sweep.space import read_sweep


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """Plan four trials of six steps."""
    parameters = {"beta": {"values": [0.0, 0.25, 0.5, 1.0]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"method": "grid", "parameters": parameters}))
    plan = plan_sweep(read_sweep(str(tmp_path / "mine.yaml")), "smoke", {}, None, True)
    return Board(plan, tmp_path / "run")


def test_every_status_is_told_with_steps_and_time_left(board: Board) -> None:
    journal = board.journal()
    trials = [journal.begin(slot, board.plan.values(slot)) for slot in range(3)]
    journal.finish(trials[0], 0.5)
    journal.fail(trials[2])
    metrics = board.run.variant("lambda0_beta0.25_lr0.001_seed0").metrics
    metrics.parent.mkdir(parents=True)
    lines = [{"step": step, "time/step_s": seconds} for step, seconds in ((1, 9.0), (2, 2.0), (3, 1.0), (4, 2.0))]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "ti')
    report = board.report(journal)
    assert [(t.status, t.step, t.steps, t.metric, t.left_s) for t in report.trials] == [
        ("complete", 6, 6, 0.5, None),
        ("running", 4, 6, None, 4.0),
        ("failed", 0, 6, None, None),
        ("waiting", 0, 6, None, None),
    ]
    assert report.best == "lambda0_beta0_lr0.001_seed0"


def test_what_was_read_is_not_read_again_unless_the_file_is_new(tmp_path: Path) -> None:
    path, follower = tmp_path / "metrics.jsonl", Follower()

    def line(step: int, seconds: float) -> str:
        return json.dumps({"step": step, "time/step_s": seconds}) + "\n"

    follower.look(path)
    assert (follower.done, follower.left(9)) == (0, None)
    path.write_text(line(1, 5.0) + line(2, 1.0)[:9])
    follower.look(path)
    assert (follower.done, follower.left(9)) == (1, 40.0)
    with open(path, "r+") as file:  # what was read is worthless now: only the rest may be looked at
        file.write("x" * (len(line(1, 5.0)) - 1))
        file.seek(len(line(1, 5.0)))
        file.write(line(2, 1.0) + line(3, 3.0))
    follower.look(path)
    follower.look(path)
    assert (follower.done, follower.left(9)) == (3, 18.0)
    write_text(path, "".join(line(step, 2.0) for step in range(1, 8)))
    follower.look(path)
    assert (follower.done, follower.left(9)) == (7, 4.0)
    path.write_text(line(1, 8.0))
    follower.look(path)
    assert (follower.done, follower.left(9)) == (1, 64.0)


@pytest.mark.parametrize(
    ("goal", "name", "best"), [("minimize", "forward_kl", "0.25"), ("maximize", "top1_agreement", "1")]
)
def test_the_best_is_what_the_goal_says(tmp_path: Path, board: Board, goal: str, name: str, best: str) -> None:
    file = board.plan.sweep.file.model_dump(exclude_none=True) | {"metric": {"name": f"eval/{name}", "goal": goal}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(file))
    board = Board(plan_sweep(read_sweep(str(tmp_path / "mine.yaml")), "smoke", {}, None, True), tmp_path / "run")
    journal = board.journal()
    for slot, value in enumerate((0.5, 0.0, 0.25, 0.75)):
        journal.finish(journal.begin(slot, board.plan.values(slot)), value)
    assert board.report(journal).best == f"lambda0_beta{best}_lr0.001_seed0"


def test_names_are_relative_to_the_folders_own_preset(board: Board) -> None:
    assert [trial.variant for trial in preview(board.plan)] == [t.variant for t in board.report(board.journal()).trials]
    write_record(board.run.preset, load_preset("smoke", {"distill.steps": 7}))
    first = board.report(board.journal()).trials[0]
    assert first.variant == "lambda0_beta0_lr0.001_seed0_steps6"
