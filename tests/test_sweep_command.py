"""``kdctl sweep``: all mistakes are found before the first trial, and shards share one folder."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kdctl import cli
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
        "from kdctl.cli import main\n"
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
