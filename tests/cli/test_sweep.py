"""``kdctl sweep``: all mistakes are found before the first trial, and shards share one folder."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from kdctl.cli import app as cli
from kdctl.run.paths import RunDir
from kdctl.run.record_files import read_record
from kdctl.run.records import DistillReport
from kdctl.sweep import local

HEAVY = ("torch", "transformers", "datasets", "wandb", "lm_eval", "accelerate")
Invoke = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """Run the command line in this process; a trial that starts is a failure."""

    def refuse(*_: object) -> None:
        raise AssertionError("a trial started")

    monkeypatch.setattr(local, "run_shard", refuse)
    before = dict(os.environ)
    yield lambda *arguments: CliRunner().invoke(cli.app, ["sweep", *map(str, arguments)])
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Write a sweep of the smoke preset: six trials without benchmark tasks."""
    path = tmp_path / "grid.yaml"
    path.write_text(
        "method: grid\n"
        "parameters:\n"
        "  preset: {value: smoke}\n"
        "  eval.tasks: {value: []}\n"
        "  lmbda: {values: [0.0, 0.5, 1.0]}\n"
        "  beta: {values: [0.0, 1.0]}\n"
    )
    return path


def check_refused(done: Result, *parts: str) -> None:
    """Check for exit code 2, nothing on stdout and one clear message on stderr."""
    assert done.exit_code == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


def test_a_dry_run_prints_the_trials_imports_nothing_heavy_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import atexit, sys\n"
        "from kdctl.cli.app import main\n"
        f"atexit.register(lambda: print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr))\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "sweep", "beta_lambda_grid", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "\n")
    for lmbda in ("0", "0.5", "1"):
        for beta in ("0", "0.5", "1"):
            assert f"lambda{lmbda}_beta{beta}_lr5e-06_seed0" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_one_trial_prints_that_one_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["sweep", "beta_lambda_grid", "lmbda=1", "beta=0.5", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert [name for name in ("lambda1_beta0.5", "lambda0_", "beta1_") if name in done.stdout] == ["lambda1_beta0.5"]
    told = CliRunner().invoke(cli.app, ["sweep", "beta_lambda_grid", "lmbda=1", "beta=0.5", "--dry-run", "--json"])
    assert json.loads(told.stdout)["0"]["values"] == {"distill.lmbda": 1.0, "distill.beta": 0.5}
    whole = json.loads(CliRunner().invoke(cli.app, ["sweep", "beta_lambda_grid", "--dry-run", "--json"]).stdout)
    assert [trial["number"] for trial in whole.values()] == list(range(9))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("lr_onpolcy", ("did you mean 'lr_onpolicy'?",)),
        ("{grid} --set quantize.bist=4", ("quantize.bist", "did you mean 'quantize.bits'?")),
        ("{grid} --set distill.beta=1", ("distill.beta is swept",)),
        ("{grid} --set distill.steps=0", ("distill.steps=0",)),
        ("{grid} --max-trials 5", ("has 6 trials", "--max-trials is 5")),
        ("{grid} --shard 4/4", ("--shard 4/4", "4 is not one of them")),
        ("{grid} --shard one", ("--shard 'one'", "0/4")),
        ("{grid} --shard 0/2 --jobs 2", ("--shard 0/2", "--jobs 2")),
        ("{grid} --preset smok", ("did you mean 'smoke'?",)),
        ("{grid} beta=1", ("also sweeps distill.lmbda",)),
        ("{grid} beta=1 lmbda=2", ("lmbda=2",)),
    ],
)
def test_a_mistake_is_refused_before_the_first_trial(
    invoke: Invoke, grid: Path, tmp_path: Path, arguments: str, parts: tuple[str, ...]
) -> None:
    check_refused(invoke(*shlex.split(arguments.format(grid=grid)), "--run", tmp_path / "run"), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_folder_that_cannot_be_written_is_refused(invoke: Invoke, grid: Path, tmp_path: Path, jobs: int) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "run"
    check_refused(invoke(grid, "--run", folder, "--jobs", jobs), str(folder), "--run")


def test_a_full_volume_is_one_message(
    invoke: Invoke, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device", "journal.log")

    monkeypatch.setattr(local, "run_shard", fill)
    check_refused(invoke(grid, "--run", tmp_path / "run"), "journal.log", "what was finished is on disk")


def test_the_folder_is_named_after_the_sweep(
    invoke: Invoke, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(local, "run_shard", lambda board, shard, reporter: ran.append((board.run.path, shard.name)))
    monkeypatch.chdir(tmp_path)
    done = invoke(grid, "--json", "--shard", "1/3")
    assert done.exit_code == 0, done.stderr
    assert ran == [(Path("runs/grid"), "1-of-3")]
    report = json.loads(done.stdout)
    assert [(trial["values"]["distill.lmbda"], trial["status"]) for trial in report["trials"][::2]] == [
        (0.0, "waiting"),
        (0.5, "waiting"),
        (1.0, "waiting"),
    ]


def test_a_new_folder_without_a_preset_is_told(invoke: Invoke, grid: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(local, "run_shard", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    assert invoke(grid, "--run", "named", "--json").stderr == ""
    grid.write_text(grid.read_text().replace("  preset: {value: smoke}\n", ""))
    done = invoke(grid, "--run", "new", "--json")
    assert done.stderr == "new run folder new, from preset quickstart\n"
    assert len(json.loads(done.stdout)["trials"]) == 6


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def pods(invoke: Invoke, *arguments: object) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the manifests that are printed, and the words of a pod's command."""
    done = invoke(*arguments, "--backend", "kubernetes")
    assert done.exit_code == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    (container,) = found[-1]["spec"]["template"]["spec"]["containers"]
    shell, flag, script = container["command"]
    assert (shell, flag) == ("/bin/sh", "-c")
    return found, shlex.split(script)


def test_pods_are_shards_of_a_shipped_sweep(invoke: Invoke) -> None:
    (job,), words = pods(invoke, "lr_onpolicy", "--agents", 4, "--set", "distill.seed=3", "--no-eval")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert words == shlex.split(
        "exec kdctl sweep lr_onpolicy --run runs/lr_onpolicy --set distill.seed=3 --no-eval "
        "--shard $JOB_COMPLETION_INDEX/4"
    )


def test_a_sweep_file_and_a_preset_file_travel_with_the_pods(invoke: Invoke, grid: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("[teacher]\nmodel = 'pkg:kdctl/data/tiny'\n[quantize]\ngroup_size = 32\n")
    (config, job), words = pods(invoke, grid, "--agents", 100, "--preset", mine)
    assert config["data"] == {"0-grid.yaml": grid.read_text(), "1-mine.toml": mine.read_text()}
    assert words[3:8] == [str(grid), "--run", "runs/grid", "--preset", str(mine)]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert [mount["mountPath"] for mount in container["volumeMounts"][2:]] == [str(grid), str(mine)]
    assert job["spec"]["completions"] == 6


def test_pods_may_be_wandb_agents(invoke: Invoke) -> None:
    (job,), words = pods(invoke, "lr_onpolicy", "--agents", 9, "--sweep-id", "me/kdctl/abc")
    assert words == ["exec", "wandb", "agent", "me/kdctl/abc"]
    assert job["spec"]["completions"] == 9


def test_agents_in_pods_have_the_sweep_file_that_wandbs_command_names(invoke: Invoke, grid: Path) -> None:
    (config, _), _ = pods(invoke, grid, "--sweep-id", "me/kdctl/abc")
    assert config["data"] == {"0-grid.yaml": grid.read_text()}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("{grid} --backend kubernetes --max-trials 5", ("has 6 trials",)),
        ("{grid} --backend kubernetes --run /elsewhere", ("/elsewhere", "runs/NAME")),
        ("{grid} --backend kubernetes --pod gpu=1", ("gpu=1", "gpus")),
        ("{grid} --backend kubernetes --agents 0", ("--agents 0",)),
        ("{grid} --backend kubernetes --sweep-id a/b/c --preset smok", ("did you mean 'smoke'?",)),
        ("{grid} --backend kubernetes --jobs 2", ("--jobs", "kubernetes")),
        ("{grid} --apply", ("--apply", "--backend local")),
        ("{grid} --agents 2", ("--agents", "--backend local")),
    ],
)
def test_a_mistake_is_refused_before_anything_is_printed(
    invoke: Invoke, grid: Path, arguments: str, parts: tuple[str, ...]
) -> None:
    check_refused(invoke(*shlex.split(arguments.format(grid=grid))), *parts)


# --- wandb ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], str | None]]:
    """Stand in for wandb's server: keep the sweeps that are created."""
    created: list[tuple[dict[str, Any], str | None]] = []

    def sweep(config: dict[str, Any], entity: str | None, project: str | None) -> str:
        created.append((config, project))
        print("Create sweep with ID: abc")
        return "abc"

    monkeypatch.setattr("wandb.sweep", sweep)
    return created


def test_a_wandb_sweep_runs_kdctl_with_the_values(invoke: Invoke, tmp_path: Path, server) -> None:
    done = invoke("lr_onpolicy", "--backend", "wandb", "--agents", 0, "--run", tmp_path / "run", "--no-eval")
    assert (done.exit_code, done.stdout) == (0, "wandb agent kdctl/abc\n"), done.stderr
    ((config, project),) = server
    assert project == "kdctl"
    assert config["parameters"]["distill.lr"] == {"values": [1e-6, 5e-6, 1e-5, 5e-5, 1e-4]}
    words = f"sweep lr_onpolicy --run {tmp_path / 'run'} --no-eval --set tracking.wandb=online".split()
    assert config["command"] == ["${env}", "${interpreter}", "-P", "-m", "${program}", *words, "${args_no_hyphens}"]


def test_agents_are_wandbs_own_program(invoke: Invoke, tmp_path: Path, server, monkeypatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("kdctl.sweep.workers.run_workers", lambda commands, logs: started.extend(commands))
    arguments = ("--backend", "wandb", "--agents", 2, "--sweep-id", "me/kdctl/xyz", "--run", tmp_path / "run")
    assert invoke("lr_onpolicy", *arguments).exit_code == 0
    assert server == []
    assert started == [[sys.executable, "-P", "-m", "wandb", "agent", "me/kdctl/xyz"]] * 2


def test_a_wandb_sweep_is_checked_before_it_is_created(invoke: Invoke, grid: Path, tmp_path: Path, server) -> None:
    for more, part in (("--max-trials 5", "has 6 trials"), ("--set distill.steps=0", "distill.steps=0")):
        arguments = f"--backend wandb --run {tmp_path / 'run'} {more}".split()
        check_refused(invoke(grid, *arguments), part)
    assert server == []


# --- shards for real --------------------------------------------------------------------------------------------------


class PodShells:
    """Runs the pods' own command in local processes that share one folder."""

    def __init__(self, command: list[str], folder: Path):
        self.command, self.folder = command, folder
        self.said: list[str] = []

    def start(self, index: int) -> subprocess.Popen[str]:
        """Start one pod's shell with the variable that Kubernetes sets."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"JOB_COMPLETION_INDEX": str(index), "PATH": path}
        return subprocess.Popen(self.command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, text=True)

    def end(self, process: subprocess.Popen[str]) -> int:
        """Wait for a pod and keep what it said."""
        self.said.append(process.communicate(timeout=300)[1])
        return process.returncode


@pytest.mark.slow
def test_pods_cover_the_grid_exactly_once_also_when_one_is_killed_and_restarted(
    invoke: Invoke, grid: Path, tmp_path: Path
) -> None:
    more = ("--set", "distill.steps=12")
    found, _ = pods(invoke, grid, *more, "--agents", 3)
    command = found[-1]["spec"]["template"]["spec"]["containers"][0]["command"]
    shells = PodShells(command, tmp_path)
    first, victim, third = (shells.start(index) for index in range(3))
    run = RunDir(tmp_path / "runs" / "grid")
    killed = run.variant("lambda0_beta1_lr0.001_seed0")
    deadline = time.monotonic() + 200
    while not list(killed.checkpoints.glob("step_*/meta.json")):
        assert time.monotonic() < deadline
        assert victim.poll() is None
        time.sleep(0.01)
    victim.kill()
    assert shells.end(victim) == -signal.SIGKILL
    assert not killed.report.exists()
    assert [shells.end(pod) for pod in (first, third, shells.start(1))] == [0, 0, 0]
    said = "".join(shells.said)
    for once in ("no student yet", "no teacher rollouts yet", "going on from step"):
        assert said.count(once) == 1
    names = [f"lambda{lmbda}_beta{beta}_lr0.001_seed0" for lmbda in ("0", "0.5", "1") for beta in ("0", "1")]
    assert [variant.name for variant in run.variants()] == sorted(names)
    assert {path.parent.name for path in run.eval_root.glob("*/results.json")} == {*names, "teacher", "ptq"}
    assert not re.search(r"distill: .* skipped", said)
    alone = ["sweep", str(grid), "lmbda=0.0", "beta=1.0", "--run", str(tmp_path / "alone"), *more, "--no-eval"]
    subprocess.run([sys.executable, "-m", "kdctl", *alone], check=True, capture_output=True, timeout=300)
    (undisturbed,) = RunDir(tmp_path / "alone").variants()
    here, there = (read_record(variant.report, DistillReport) for variant in (killed, undisturbed))
    assert (here.after, here.identity) == (there.after, there.identity)


@pytest.mark.slow
def test_jobs_are_processes_of_their_own_and_the_result_is_clean(grid: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdctl", "sweep", str(grid), "--run", str(tmp_path / "run"), "--jobs", "2"]
    command += ["--no-eval", "--json", "--set", "distill.steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert {trial["status"] for trial in json.loads(done.stdout)["trials"]} == {"complete"}
    logs = [path.read_text() for path in (tmp_path / "run" / "sweeps" / "grid").glob("worker-*.log")]
    assert len(logs) == 2
    assert "".join(logs).count("no student yet") == 1
