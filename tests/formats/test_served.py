"""``kdctl verify --engine``: a server that computes the student passes, another model does not."""

from pathlib import Path

import pytest
import torch
from stub_server import serving
from typer.testing import CliRunner

from kdctl.cli.app import app
from kdctl.config.preset import Preset
from kdctl.formats.student import load_student
from kdctl.model.load import load_model
from kdctl.stages import pipeline
from kdctl.stages.context import open_run

CPU = torch.device("cpu")


@pytest.mark.slow
def test_a_server_is_compared_with_the_student_here(smoke: Preset, tiny_dir: Path, tmp_path: Path) -> None:
    pipeline.ensure_student(*open_run(smoke, tmp_path))
    folder = tmp_path / "student"
    with serving("vllm", load_student(folder, CPU).model) as stub:
        right = CliRunner().invoke(app, ["verify", str(folder), "--engine", stub.url])
    assert right.exit_code == 0, right.output
    assert "vllm 0.32.0: 0.0000 nats off those here on average over" in right.stdout
    assert "KL(served‖here) 0.0000 [0.0000, 0.0000]" in " ".join(right.stdout.split())
    with serving("vllm", load_model(tiny_dir, torch.bfloat16, CPU)) as stub:
        wrong = CliRunner().invoke(app, ["verify", str(folder), "--engine", stub.url, "--json"])
    assert wrong.exit_code == 1
    assert '"name": "served log-probabilities",\n      "status": "failed"' in wrong.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--engine", "vlm"],
            "serve='vlm' is neither vllm, sglang, llama-server nor a command with {port} and {weights}",
        ),
        (["--engine", "x {port}"], "with {port} and {weights} in it"),
        (["--engine", "http://user:secret@host:1"], "must not hold a secret; give http://host:1 and the key in KDCTL"),
        (["--engine", "http://"], "is no address of a server; write it like http://127.0.0.1:8000"),
        (["--weights", "dense"], "--engine names none; give both"),
    ],
)
def test_an_engine_that_is_none_is_refused_before_any_work(words: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(tmp_path), *words])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.slow
def test_without_held_out_completions_it_is_said_where_there_are_some(smoke: Preset, tmp_path: Path) -> None:
    pipeline.ensure_student(*open_run(smoke, tmp_path / "run"))
    alone = (tmp_path / "run" / "student").rename(tmp_path / "alone")
    result = CliRunner().invoke(app, ["verify", str(alone), "--engine", "http://127.0.0.1:9"])
    assert result.exit_code == 2
    assert "is in no run folder with held-out completions" in " ".join(result.stderr.split())
