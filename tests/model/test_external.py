"""A model made elsewhere becomes a row of its own, if a token means the same to it as to the teacher."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from kdctl.base.errors import ModelError, PresetError
from kdctl.config.preset import Preset
from kdctl.config.resolve import load_preset
from kdctl.model import external
from kdctl.model.load import load_model
from kdctl.report.study_reader import read_study
from kdctl.rollout.store import RolloutStore
from kdctl.run.record_files import read_record
from kdctl.run.records import EvalResult
from kdctl.stages import pipeline
from kdctl.stages.context import Run, open_run
from kdctl.stages.yardstick import ensure_measuring

CPU = torch.device("cpu")
tiny = sys.modules["tiny"]


@pytest.fixture
def job(smoke: Preset, tmp_path: Path) -> Run:
    """Open a run on the tiny teacher."""
    return open_run(smoke, tmp_path / "run")


def evaluated(job: Run, name: str, folder: Path) -> EvalResult:
    return pipeline.evaluate(*job, also=pipeline.open_foreign(*job, name, str(folder)))[name]


def swapped(folder: Path) -> None:
    """Exchange two tokens of a tokenizer."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.slow
def test_a_plain_folder_is_a_row_after_ptq(job: Run, tmp_path: Path) -> None:
    pipeline.distill(*job, name="mine")
    other = tiny.build(tmp_path / "other", seed=3)
    result = evaluated(job, "other", other)
    assert result.reference == str(other)
    assert result.settings == {}
    assert result.distribution.forward_kl.value > 0.1
    assert [model.name for model in read_study([job.context.paths]).models] == ["teacher", "ptq", "other", "mine"]


@pytest.mark.slow
def test_the_teacher_itself_from_elsewhere_has_no_divergence(job: Run, tiny_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dir, tmp_path / "copy")
    result = evaluated(job, "copy", copy)
    assert result.distribution.forward_kl.value == 0
    assert result.text == ensure_measuring(*job).teacher_text()


@pytest.mark.slow
def test_an_untied_wider_model_is_measured_with_its_own_head(job: Run, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "other", seed=3, hidden_size=96, tie_word_embeddings=False)
    result = evaluated(job, "other", other)
    model, nll, tokens = load_model(other, torch.bfloat16, CPU), 0.0, 0
    for rollout in RolloutStore(job.context.paths.heldout).read():
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logprobs = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].float().log_softmax(-1)
        nll -= float(logprobs[torch.arange(len(logprobs)), rollout.completion_ids].sum())
        tokens += len(rollout.completion_ids)
    assert result.distribution.perplexity.value == pytest.approx(math.exp(nll / tokens), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_compressed_tensors_folder_is_what_kdctl_measures(
    job: Run, smoke: Preset, tiny_dir: Path, tmp_path: Path, symmetric: bool
) -> None:
    grid = {"quantize.symmetric": symmetric, "quantize.group_size": 16, "quantize.method": "minmax"}
    elsewhere = open_run(
        load_preset("smoke", {"teacher.model": str(tiny_dir), "eval.tasks": [], **grid}), tmp_path / "elsewhere"
    )
    report = pipeline.quantize(*elsewhere)
    folder = shutil.copytree(elsewhere.context.paths.student, tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["dequantize"]  # as other programs write it
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("quantize.json", "SHA256SUMS", "heldout.parquet"):
        (folder / name).unlink()
    result = evaluated(job, "theirs", folder)
    assert result.distribution == report.distribution
    assert result.text == report.text
    assert result.size_bytes == report.student_bytes


@pytest.mark.slow
def test_a_second_evaluation_is_skipped_and_other_weights_are_not(job: Run, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "other", seed=3)
    first = evaluated(job, "other", other)
    assert evaluated(job, "other", other) == first
    tiny.build(tmp_path / "other", seed=4)
    assert evaluated(job, "other", other).weights != first.weights


def test_named_models_are_evaluated_with_it_and_no_others(job: Run, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "other", seed=3)
    found = pipeline.evaluate(*job, names=["teacher"], also=pipeline.open_foreign(*job, "other", str(other)))
    assert list(found) == ["teacher", "other"]


def test_another_tokenizer_is_refused_before_any_weight_is_read(job: Run, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "other", seed=3)
    swapped(other)
    (other / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="vocabulary and splitting of text are not the teacher's"):
        evaluated(job, "other", other)
    assert not job.teacher.loaded


def test_another_vocabulary_size_is_refused_with_both_numbers(job: Run, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "other", seed=3, vocab_size=272)
    with pytest.raises(ModelError, match=r"vocab_size=272 and the teacher's is 264"):
        evaluated(job, "other", other)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_format_without_its_package_is_refused_by_name(tiny_dir: Path, tmp_path: Path, method: str) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / method)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "zero_point": True}
    (folder / "config.json").write_text(json.dumps(config))
    model = external.find_foreign("x", str(folder), torch.bfloat16, offline=True)
    with pytest.raises(ModelError, match=method):
        external.load_foreign(model, torch.bfloat16, CPU)


@pytest.mark.slow
def test_names_that_are_taken_or_no_names_are_refused(job: Run, tiny_dir: Path) -> None:
    pipeline.distill(*job, name="mine")
    with pytest.raises(PresetError, match=r"--as 'mine' is the name of a variant"):
        evaluated(job, "mine", tiny_dir)
    for name in ("ptq", "../up", ""):
        with pytest.raises(PresetError, match="--as"):
            pipeline.open_foreign(*job, name, str(tiny_dir))


def test_the_command_adds_the_row_and_keeps_it(
    smoke: Preset, tiny_dir: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    other = tiny.build(tmp_path / "other", seed=3)
    run = tmp_path / "run"
    open_run(smoke, run)
    done = invoke("eval", "--run", run, "--also", other, "--as", "theirs")
    assert done.exit_code == 0, done.output
    assert "\n| theirs | " in done.stdout
    assert read_record(run / "eval" / "theirs" / "results.json", EvalResult).reference == str(other)
    assert "\n| theirs | " in invoke("report", "--run", run).stdout
    swapped(other)
    refused = invoke("eval", "--run", run, "--also", other, "--as", "theirs")
    assert refused.exit_code == 2
    assert "not the teacher's" in refused.stderr


def test_the_command_wants_both_options(smoke: Preset, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    open_run(smoke, tmp_path)
    for arguments in (("--also", "x"), ("--as", "x")):
        done = invoke("eval", "--run", tmp_path, *arguments)
        assert done.exit_code == 2
        assert "give both or neither" in done.stderr
