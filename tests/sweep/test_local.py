"""A local sweep: every trial a variant, shared work once, and nothing lost."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from made_up import known
from transformers import AutoModelForCausalLM

from kdctl.base.errors import DataError, StoreError, TrainingError
from kdctl.base.progress import Silent
from kdctl.model.batch import predicting_states
from kdctl.rollout import teacher_states
from kdctl.rollout.store import RolloutStore
from kdctl.run.record_files import read_record
from kdctl.run.records import DistillReport
from kdctl.stages import pipeline
from kdctl.stages.context import open_run
from kdctl.sweep.board import Board
from kdctl.sweep.local import metric_value, run_shard
from kdctl.sweep.plan import Shard, plan_sweep
from kdctl.sweep.space import read_sweep

GRID = {"lmbda": {"values": [0.0, 1.0]}, "beta": {"values": [0.0, 1.0]}}


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def statuses(board: Board) -> list[str]:
    """Tell how each trial stands."""
    return [trial.status for trial in board.report(board.journal()).trials]


def board_of(
    folder: Path,
    tiny_dir: Path,
    parameters: dict[str, Any],
    evaluate: bool = True,
    preset: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Board:
    """Plan a sweep of the smoke preset on the tiny teacher, two steps a trial."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters, **more}, sort_keys=False))
    settings = {"teacher.model": str(tiny_dir), "eval.tasks": [], "distill.steps": 2, "distill.heldout_every": 1}
    settings |= preset
    return Board(plan_sweep(read_sweep(str(path)), "smoke", settings, None, evaluate), folder / "run")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Board:
    """Run a grid of four trials."""
    board = board_of(tmp_path_factory.mktemp("swept"), tiny_dir, GRID)
    run_shard(board, Shard(), Silent())
    return board


@pytest.mark.slow
def test_every_trial_is_a_variant_with_its_evaluation_and_the_best_is_the_lowest(swept: Board) -> None:
    report = swept.report(swept.journal())
    assert [trial.status for trial in report.trials] == ["complete"] * 4
    assert [trial.variant for trial in report.trials] == [
        f"lambda{lmbda}_beta{beta}_lr0.001_seed0" for lmbda in (0, 1) for beta in (0, 1)
    ]
    found = {variant.name: read_record(variant.report, DistillReport) for variant in swept.run.variants()}
    assert {t.variant: t.metric for t in report.trials} == {n: r.after.forward_kl.value for n, r in found.items()}
    assert report.best == min(found, key=lambda name: found[name].after.forward_kl.value)
    assert {path.parent.name for path in swept.run.eval_root.glob("*/results.json")} == {"teacher", "ptq", *found}


@pytest.mark.slow
def test_a_sweep_trains_what_distill_trains(swept: Board, tmp_path: Path) -> None:
    preset = swept.plan.trial_preset(swept.plan.trials[3])
    alone = pipeline.distill(*open_run(preset, tmp_path / "alone"))
    together = read_record(swept.run.variant(alone.variant).report, DistillReport)
    assert (alone.after, alone.identity) == (together.after, together.identity)


@pytest.mark.slow
def test_a_repeated_sweep_does_nothing_twice(swept: Board) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.run.path.rglob("*") if "sweeps" not in path.parts}
    notes = Notes()
    run_shard(swept, Shard(), notes)
    assert {said.split(":")[0] for said in notes.said} == {"distill", "eval"}
    assert all(said.endswith("is complete, skipped") for said in notes.said)
    files = {path: path.stat().st_mtime_ns for path in before if path.is_file()}
    assert files == {path: before[path] for path in files}


@pytest.mark.slow
def test_a_trial_that_diverges_does_not_end_the_sweep_and_is_tried_again(
    tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = board_of(tmp_path, tiny_dir, {"beta": {"values": [0.0, 1.0]}}, evaluate=False)
    distill, notes = pipeline.distill, Notes()

    def diverging(context, *more, **named):
        if context.preset.distill.beta == 0:
            raise TrainingError("loss nan")
        return distill(context, *more, **named)

    monkeypatch.setattr(pipeline, "distill", diverging)
    run_shard(board, Shard(), notes)
    assert statuses(board) == ["failed", "complete"]
    assert any("beta=0.0 failed: loss nan" in said for said in notes.said)
    assert not board.run.eval_root.exists()
    monkeypatch.setattr(pipeline, "distill", distill)
    run_shard(board, Shard(), Silent())
    assert statuses(board) == ["complete", "complete"]


@pytest.mark.slow
def test_trials_share_one_teacher_in_memory_and_its_states_on_disk(
    tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, read = [], []
    load = AutoModelForCausalLM.from_pretrained
    noted = lambda folder, **more: loaded.append(folder) or load(folder, **more)  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    passed = lambda model, batch: read.extend(batch.seq_lens) or predicting_states(model, batch)  # noqa: E731
    monkeypatch.setattr(teacher_states, "predicting_states", passed)
    entries = {"beta": {"values": [0.0, 1.0]}, "rollout.keep_states": {"value": "exact"}}
    board = board_of(tmp_path, tiny_dir, entries, evaluate=False)
    run_shard(board, Shard(), Silent())
    assert loaded.count(tiny_dir) == 2, "to be quantized, and for all that is trained"
    assert len(read) == RolloutStore(board.run.rollouts("teacher")).manifest().rows
    assert statuses(board) == ["complete"] * 2


@pytest.mark.slow
def test_no_trial_starts_once_the_target_is_reached(tmp_path: Path, tiny_dir: Path) -> None:
    metric = {"name": "eval/forward_kl", "goal": "minimize", "target": 1e9}
    board, notes = board_of(tmp_path, tiny_dir, {"beta": {"values": [0.0, 1.0]}}, False, metric=metric), Notes()
    run_shard(board, Shard(), notes)
    assert statuses(board) == ["complete", "waiting"]
    assert notes.said[-1] == "metric.target=1e+09 is reached, no further trial starts"


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_stopped_for_good(tmp_path: Path, tiny_dir: Path) -> None:
    early = {"type": "hyperband", "min_iter": 1, "eta": 2}
    entries = {"distill.lr": {"values": [1e-12, 1.0]}}
    board, notes = board_of(tmp_path, tiny_dir, entries, False, early_terminate=early), Notes()
    run_shard(board, Shard(), notes)
    assert statuses(board) == ["complete", "stopped"]
    assert "trial lr=1.0 stopped by early_terminate at step 1" in notes.said
    assert [variant.name for variant in board.run.variants()] == ["lambda0_beta0_lr1e-12_seed0"]
    run_shard(board, Shard(), notes)
    assert notes.said[-1] == "trial lr=1.0 was stopped by early_terminate, skipped"
    assert statuses(board) == ["complete", "stopped"]
    pipeline.distill(*open_run(board.plan.trial_preset(board.plan.trials[1]), board.run.path))
    assert [variant.name for variant in board.run.variants()] == [
        "lambda0_beta0_lr1_seed0",
        "lambda0_beta0_lr1e-12_seed0",
    ]


@pytest.mark.slow
def test_a_trial_that_is_trained_to_its_end_is_not_stopped_there(tmp_path: Path, tiny_dir: Path) -> None:
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    board = board_of(tmp_path, tiny_dir, {"distill.lr": {"values": [1e-12, 1.0]}}, False, early_terminate=early)
    run_shard(board, Shard(), Silent())
    assert statuses(board) == ["complete", "complete"]


@pytest.mark.slow
def test_bayes_runs_as_many_trials_as_asked(tmp_path: Path, tiny_dir: Path) -> None:
    board = board_of(tmp_path, tiny_dir, {"beta": {"min": 0.0, "max": 1.0}}, False, method="bayes", run_cap=3)
    run_shard(board, Shard(1, 2), Silent())
    assert statuses(board) == ["waiting", "complete", "waiting"]
    run_shard(board, Shard(), Silent())
    assert len(board.run.variants()) == 3


@pytest.mark.slow
def test_rollout_lengths_are_variants_of_their_own(tmp_path: Path, tiny_dir: Path) -> None:
    entries = {"rollout.max_new_tokens": {"values": [4, 16]}, "lmbda": {"value": 1.0}}
    board = board_of(tmp_path, tiny_dir, entries, evaluate=False)
    run_shard(board, Shard(), Silent())
    assert [variant.name for variant in board.run.variants()] == [
        "lambda1_beta0_lr0.001_seed0",
        "lambda1_beta0_lr0.001_seed0_max_new_tokens4",
    ]


@pytest.mark.slow
def test_a_folder_of_another_teacher_is_refused_before_the_first_trial(
    swept: Board, tmp_path: Path, tiny_dir_fp32: Path
) -> None:
    other = Board(board_of(tmp_path, tiny_dir_fp32, GRID).plan, swept.run.path)
    with pytest.raises(StoreError, match=r"teacher\.model"):
        run_shard(other, Shard(), Silent())


@pytest.mark.parametrize(
    ("task", "metric"),
    [("coqa_text_offline", "acc"), ("arc_easy_offline", "bits_per_byte"), ("lambada_offline", "p_right")],
)
def test_a_metric_that_a_task_has_not_is_refused_before_anything_is_trained(
    tmp_path: Path, tiny_dir: Path, task: str, metric: str
) -> None:
    name, tasks = f"eval/{task}/{metric}", {"eval.tasks": [task]}
    goal = "minimize" if metric == "bits_per_byte" else "maximize"
    board = board_of(tmp_path, tiny_dir, GRID, preset=tasks, metric={"name": name, "goal": goal})
    (tmp_path / "run" / "eval").mkdir(parents=True)  # also in a folder whose tasks were loaded before
    with pytest.raises(DataError, match=f"has no {name}, which trials are ranked by; it has eval/{task}/"):
        run_shard(board, Shard(), Silent())
    assert not board.run.student.exists()


@pytest.mark.slow
def test_metrics_are_found_by_their_names(swept: Board) -> None:
    report = read_record(swept.run.variants()[0].report, DistillReport)
    assert metric_value("eval/top1_agreement", report, None) == known(report.after.top1_agreement).value
    with pytest.raises(DataError, match="eval/arc_easy/acc"):
        metric_value("eval/arc_easy/acc", report, None)
