"""kdctl under ``accelerate launch``: the same run as one process, and what happens when a process dies."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from kdctl.cli.app import app
from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.formats.student import load_student
from kdctl.run.paths import VariantDir
from kdctl.run.record_files import read_record
from kdctl.run.records import EvalResult
from kdctl.run.tracking import read_metrics
from kdctl.stages import pipeline
from kdctl.stages.context import open_run
from kdctl.system import distributed

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
SHARDS = "--use_fsdp --fsdp_version 2"
MIXED = {"distill.lmbda": 0.5, "distill.refresh_every": 2, "distill.checkpoint_every": 2, "teacher.dtype": "float32"}


def launch(command: str, preset: Path, run: Path, how: str = "--multi_gpu") -> "subprocess.Popen[str]":
    """Start two processes of a command."""
    words = [*LAUNCH, *how.split(), "-m", "kdctl", command, *([] if command == "run" else ["--preset"]), str(preset)]
    return subprocess.Popen([*words, "--run", str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def settings(smoke: Preset, teacher: Path, folder: Path, **changes) -> tuple[Preset, Path]:
    """Return a preset that trains on both kinds of rows, and its file."""
    changed = MIXED | {"teacher.model": str(teacher)} | {key.replace("__", "."): v for key, v in changes.items()}
    preset = build_preset(smoke.model_dump(), changed, "test")
    path = folder / "preset.json"
    path.write_text(preset.model_dump_json())
    return preset, path


def differing_codes(one: Path, other: Path) -> float:
    """Return the share of codes that differ between two student folders."""
    first, second = (load_student(folder, torch.device("cpu")).weights for folder in (one, other))
    different = sum(int((first[name].codes != second[name].codes).sum()) for name in first)
    return different / sum(weight.codes.numel() for weight in first.values())


def only_variant(run: Path) -> VariantDir:
    """Return the folder of the run's one variant, finished or not."""
    (path,) = (run / "distill").iterdir()
    return VariantDir(path)


def test_other_processes_leave_commands_that_are_not_divided_to_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["presets"], ["report"], ["export"], ["verify"]):
        result = CliRunner().invoke(app, command)
        assert (result.exit_code, result.output) == (0, ""), command


def test_a_sweep_in_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "first_to_report", lambda: True)
    result = CliRunner().invoke(app, ["sweep", "quickstart_grid", "--dry-run"])
    assert result.exit_code == 2
    assert "2 processes were launched, and a sweep divides trials" in result.stderr


def test_one_process_where_several_were_asked_for_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not distributed.started_too_few()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert distributed.started_too_few()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not distributed.started_too_few()


@pytest.mark.slow
def test_a_run_of_two_processes_is_the_run_of_one(smoke: Preset, tiny_dir_fp32: Path, tmp_path: Path) -> None:
    preset, file = settings(smoke, tiny_dir_fp32, tmp_path)
    stdout, stderr = (started := launch("run", file, tmp_path / "two")).communicate(timeout=200)
    assert started.returncode == 0, stderr
    printed = pipeline.run_all(*open_run(preset, tmp_path / "one"))
    assert len(stdout.splitlines()) == len(printed.text().splitlines()), "only the main process prints"
    two, alone = only_variant(tmp_path / "two"), only_variant(tmp_path / "one")
    for store in ("heldout", "teacher"):
        both = [(tmp_path / run / "rollouts" / store / "manifest.json").read_bytes() for run in ("one", "two")]
        assert both[0] == both[1], store
    found, expected = read_metrics(two.metrics), read_metrics(alone.metrics)
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    for line, wanted in zip(found, expected, strict=True):
        assert line["train/forward_kl"] == pytest.approx(wanted["train/forward_kl"], rel=1e-3)
        assert line["train/completion_tokens"] == wanted["train/completion_tokens"]
        assert line["rollout/student_share"] == wanted["rollout/student_share"]
    assert differing_codes(two.final, alone.final) <= 1e-3
    assert sorted(p.name for p in (tmp_path / "two" / "eval").iterdir()) == sorted(["teacher", "ptq", two.name])
    for name in ("teacher", "ptq"):
        results = [read_record(tmp_path / run / "eval" / name / "results.json", EvalResult) for run in ("one", "two")]
        assert results[0].distribution == results[1].distribution


@pytest.mark.slow
def test_rows_that_do_not_divide_end_in_one_message_before_any_work(
    smoke: Preset, tiny_dir: Path, tmp_path: Path
) -> None:
    odd = {"distill__micro_batch_size": 3, "distill__gradient_accumulation": 1}
    _, file = settings(smoke, tiny_dir, tmp_path, **odd)
    stdout, stderr = (started := launch("distill", file, tmp_path / "run")).communicate(timeout=120)
    assert started.returncode != 0
    assert stdout == ""
    (message,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "= 3 rows a step cannot be divided evenly among 2 processes" in message
    assert re.search(r"exitcode\s*: 2 ", stderr)
    assert not (tmp_path / "run").exists()


def ranks(launcher: int) -> dict[int, int]:
    """Return the process id of each rank that a launcher started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher:
                pairs = (pair.partition("=") for pair in (folder / "environ").read_text().split("\0"))
                found[int({key: value for key, _, value in pairs}["RANK"])] = int(folder.name)
        except (OSError, KeyError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes of a launcher in /proc")
@pytest.mark.parametrize(("victim", "how"), [(1, "--multi_gpu"), (0, SHARDS)])
def test_a_killed_process_ends_all_and_one_or_two_go_on(
    smoke: Preset, tiny_dir_fp32: Path, tmp_path: Path, victim: int, how: str
) -> None:
    replayed = {"distill__refresh_every": 0} if how == SHARDS else {}
    preset, file = settings(smoke, tiny_dir_fp32, tmp_path, distill__steps=40, **replayed)
    started = launch("distill", file, tmp_path / "killed", how)
    while not list(tmp_path.glob("killed/distill/*/checkpoints/step_00000[4-9]")):
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.02)
    os.kill(ranks(started.pid)[victim], signal.SIGKILL)
    stdout, stderr = started.communicate(timeout=60)
    assert started.returncode != 0
    assert stdout == ""
    (message,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    # Whichever comes first: it notices the other's end, or the launcher ends it.
    assert "another process of this run has ended" in message or "stopped by SIGTERM" in message
    assert not only_variant(tmp_path / "killed").final.exists()

    if victim:
        assert launch("distill", file, tmp_path / "killed", how).wait(timeout=120) == 0
    else:
        pipeline.distill(*open_run(preset, tmp_path / "killed"))
    pipeline.distill(*open_run(preset, tmp_path / "whole"))
    resumed, whole = only_variant(tmp_path / "killed"), only_variant(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(resumed.metrics)] == list(range(1, 41))
    assert differing_codes(resumed.final, whole.final) <= 0.01


def lines_of(run: Path) -> int:
    """Count the steps that a run's one variant has logged."""
    return sum(path.read_bytes().count(b"\n") for path in run.glob("distill/*/metrics.jsonl"))


def by_hand(preset: Path, run: Path) -> "list[subprocess.Popen[str]]":
    """Start two processes as srun and pods do: each is told who it is by variables alone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-m", "kdctl", "distill", "--preset", str(preset), "--run", str(run)]
    return [
        subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, env={**os.environ, **told, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]


def a_try(file: Path, run: Path, how: str, steps: int, what: str) -> tuple[list[int], list[str]]:
    """Start a command and, after some steps, send a signal, as a scheduler does that takes the machine away.

    what: ``SIGNAL to WHOM``, a rank, the launcher or all of them; nothing without it. Returns exit codes and errors.
    """
    started = [launch("distill", file, run, how)] if how else by_hand(file, run)
    while lines_of(run) < steps:
        assert not any(one.poll() for one in started), [one.communicate() for one in started]
        time.sleep(0.005)
    if what:
        name, whom = what.split(" to ")
        found = ranks(started[0].pid) if how else {rank: one.pid for rank, one in enumerate(started)}
        pids = {"launcher": started[0].pid} if how else {}
        pids |= {str(rank): pid for rank, pid in found.items()}
        for pid in pids.values() if whom == "all" else [pids[whom]]:
            os.kill(pid, getattr(signal, name))
    said = "".join(one.communicate(timeout=120)[1] for one in started)
    return [one.returncode for one in started], [x for x in said.splitlines() if x.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes of a launcher in /proc")
@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ("", [(3, "SIGTERM to 1", [75, 75]), (8, "SIGKILL to 0", [-9, 2]), (9, "SIGUSR1 to all", [75, 75])]),
        ("--multi_gpu", [(3, "SIGTERM to all", [1]), (8, "SIGKILL to 0", [1]), (9, "SIGTERM to launcher", [1])]),
        (SHARDS, [(3, "SIGTERM to launcher", [1]), (8, "SIGKILL to 1", [1]), (9, "SIGUSR1 to 0", [1])]),
    ],
)
def test_a_preempted_training_ends_with_the_student_of_an_undisturbed_one(
    smoke: Preset, tiny_dir_fp32: Path, tmp_path: Path, how: str, ends: list[tuple[int, str, list[int]]]
) -> None:
    """There is nothing to go on from but the checkpoints of preemption; kill -9 loses the steps after the last."""
    replayed = {"distill__refresh_every": 0} if how == SHARDS else {}
    _, file = settings(smoke, tiny_dir_fp32, tmp_path, distill__steps=24, distill__checkpoint_every=0, **replayed)
    kept = 0
    for steps, what, codes in ends:
        found, (message,) = a_try(file, tmp_path / "run", how, steps, what)
        assert found == codes, what
        if not what.startswith("SIGKILL"):
            told = re.fullmatch(r"error: stopped.* after step (\d+) of 24, with its checkpoint written; .*", message)
            assert told, message
            assert int(told[1]) > kept
            kept = int(told[1])
        assert [path.name for path in only_variant(tmp_path / "run").checkpoints.iterdir()] == [f"step_{kept:06d}"]
    for run in ("run", "whole"):
        codes, said = a_try(file, tmp_path / run, how, 0, "")
        assert set(codes) == {0}, said
    resumed, whole = only_variant(tmp_path / "run"), only_variant(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(resumed.metrics)] == list(range(1, 25))
    one, other = (load_file(variant.final / "model.safetensors") for variant in (resumed, whole))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
