"""``kdctl plan`` on the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdctl.cli.app import app


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(*arguments: str):
    """Run the command."""
    return CliRunner().invoke(app, ["plan", *arguments])


def test_a_plan_is_made_without_weights_and_leaves_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "config only"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    done = plan("smoke", "--set", f"teacher.model={folder}")
    assert done.exit_code == 0, done.output
    assert "memory, training" in done.output
    assert "fits" in done.output
    assert not (tmp_path / "runs").exists()


def test_json_has_every_number(tiny_dir: Path) -> None:
    found = json.loads(plan("smoke", "--set", f"teacher.model={tiny_dir}", "--json").stdout)
    assert [phase["name"] for phase in found["phases"]] == ["generating", "training", "writing a student"]
    assert found["memory"]["needed_bytes"] == max(phase["peak_bytes"] for phase in found["phases"])


def test_memory_plans_for_another_machine(tiny_dir: Path) -> None:
    common = ("smoke", "--set", f"teacher.model={tiny_dir}")
    assert "GPU memory" in plan(*common, "--memory", "24").output
    assert "0.25 GiB there: does NOT fit" in plan(*common, "--memory", "0.25").output
    assert "RAM" in plan(*common, "--memory", "24", "--set", "runtime.device=cpu").output


def test_a_hub_model_that_is_not_here_is_a_clear_error() -> None:
    done = plan("onpolicy", "--set", "runtime.offline=true")
    assert done.exit_code == 2
    assert "Qwen/Qwen3-4B-Instruct-2507" in done.output
    assert "offline" in done.output


def test_a_grid_that_does_not_fit_is_refused(tiny_dir: Path) -> None:
    done = plan("smoke", "--set", f"teacher.model={tiny_dir}", "--set", "quantize.group_size=48")
    assert done.exit_code == 2
    assert "quantize.group_size=48" in done.output


def test_shards_plan_for_one_of_several_processes(tiny_dir: Path) -> None:
    common = ("smoke", "--set", f"teacher.model={tiny_dir}")
    found = [json.loads(plan(*common, "--shards", str(count), "--json").stdout) for count in (1, 2)]
    training = [phase["peak_bytes"] for each in found for phase in each["phases"] if phase["name"] == "training"]
    assert training[1] < training[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shards", "3"), "cannot be divided evenly among 3 processes"),
        (("--shards", "2", "--set", "distill.train=lora"), "distill.train=lora needs them whole"),
        (("--shards", "2", "--set", "distill.lmbda=1"), "live generation in process needs them whole"),
        (("--shards", "0"), "--shards"),
    ],
)
def test_shards_that_cannot_train_are_refused(tiny_dir: Path, arguments: tuple[str, ...], words: str) -> None:
    done = plan("smoke", "--set", f"teacher.model={tiny_dir}", *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.output.replace("│", " ").split())
