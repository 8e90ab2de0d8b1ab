"""What wandb is given: the file's own space, and a command that wandb's agent can expand and run."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.wandb_agent import Agent

from kdctl.base.errors import PresetError
from kdctl.run.paths import RunDir
from kdctl.run.record_files import read_record
from kdctl.run.records import DistillReport
from kdctl.sweep.plan import base_plan
from kdctl.sweep.space import Sweep, read_sweep
from kdctl.sweep.wandb_config import wandb_config

ENTRIES: dict[str, Any] = {
    "preset": {"value": "smoke"},
    "eval.tasks": {"value": []},
    "distill": {"parameters": {"steps": {"value": 2}, "heldout_every": {"value": 1}}},
    "lmbda": {"values": [0.0, 1.0]},
    "beta": {"distribution": "beta", "min": 0.0, "max": 1.0},
}


def sweep_of(folder: Path, **more: Any) -> Sweep:
    """Write and read a sweep that only wandb can draw from."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"method": "bayes", "parameters": ENTRIES, **more}, sort_keys=False))
    return read_sweep(str(path))


def config_of(sweep: Sweep, *words: str, max_trials: int | None = None, **overrides: Any) -> dict[str, Any]:
    """Return what wandb is given for a sweep of the smoke preset."""
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    return wandb_config(base_plan(sweep, "smoke", settings, True), words, max_trials)


def test_the_space_is_the_files_with_the_fields_full_names(tmp_path: Path) -> None:
    config = config_of(sweep_of(tmp_path, early_terminate={"type": "hyperband", "min_iter": 3}, run_cap=7))
    assert config["parameters"] == {
        "preset": {"value": "smoke"},
        "eval.tasks": {"value": []},
        "distill.steps": {"value": 2},
        "distill.heldout_every": {"value": 1},
        "distill.lmbda": {"values": [0.0, 1.0]},
        "distill.beta": {"distribution": "beta", "min": 0.0, "max": 1.0},
    }
    assert config["metric"] == {"name": "eval/forward_kl", "goal": "minimize"}
    assert (config["method"], config["run_cap"], config["name"]) == ("bayes", 7, "mine")
    assert config["early_terminate"] == {"type": "hyperband", "min_iter": 3}


def test_a_sweep_that_would_never_end_gets_a_cap(tmp_path: Path) -> None:
    assert config_of(sweep_of(tmp_path))["run_cap"] == 64
    assert config_of(sweep_of(tmp_path, run_cap=7), max_trials=3)["run_cap"] == 3


def test_a_metric_that_training_never_logs_is_refused(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, metric={"name": "eval/arc_easy_offline/acc", "goal": "maximize"})
    with pytest.raises(PresetError, match="eval/forward_kl, eval/reverse_kl, eval/top1_agreement"):
        config_of(sweep, eval__tasks=["arc_easy_offline"])
    with pytest.raises(PresetError, match=r"distill\.heldout_every=0"):
        config_of(sweep_of(tmp_path), distill__heldout_every=0)


class Commands(Agent):
    """wandb's own agent, without a server: told one command, as the server tells it."""

    def __init__(self, command: list[str]):
        super().__init__(api=None, queue=None, sweep_id="abc")
        self._sweep_command = command

    def run(self, run_id: str, program: str, values: dict[str, Any]) -> int:
        """Start a run with some values and return its exit code."""
        self._command_run({"run_id": run_id, "program": program, "args": {k: {"value": v} for k, v in values.items()}})
        return self._run_processes[run_id].wait()


@pytest.mark.slow
def test_the_command_that_wandbs_agent_makes_of_it_runs_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")  # the agent sets them; so they are unset after the test
    sweep = sweep_of(tmp_path)
    config = config_of(sweep, "sweep", sweep.origin, "--run", "runs/mine", "--set", "tracking.wandb=offline")
    settings = {key: entry["value"] for key, entry in config["parameters"].items() if "value" in entry}
    agent = Commands(config["command"])
    assert agent.run("run1", config["program"], {**settings, "distill.lmbda": 1.0, "distill.beta": 1e-05}) == 0
    (variant,) = RunDir(tmp_path / "runs" / "mine").variants()
    report = read_record(variant.report, DistillReport)
    assert (report.settings["lmbda"], report.settings["beta"], report.steps) == (1.0, 1e-05, 2)
    (offline,) = (tmp_path / "runs" / "mine" / "wandb").glob("offline-run-*")
    assert offline.name.endswith("-run1")
    assert agent.run("run2", config["program"], {**settings, "distill.lmbda": 2.0, "distill.beta": 0.5}) == 2
