"""Post-training methods side by side, on the tiny model."""

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kdctl.base.errors import PresetError
from kdctl.cli import app
from kdctl.config.preset import Preset
from kdctl.formats.student import load_student
from kdctl.quant.apply import dense, quantize_layers, sqnr
from kdctl.run.records import Rollout
from kdctl.stages import pipeline
from kdctl.stages.context import open_run
from kdctl.stages.quantize import by_generation

METHODS = ("minmax", "hqq", "gptq", "kl")


@pytest.mark.slow
def test_compare_measures_what_quantize_measures_and_makes_no_student(smoke: Preset, tmp_path: Path) -> None:
    job = open_run(smoke, tmp_path / "compared")
    found = {one.method: one for one in pipeline.compare(*job, app.with_methods(smoke, METHODS))}
    assert tuple(found) == METHODS
    assert not job.context.paths.student.exists()
    for method, section in zip(METHODS, app.with_methods(smoke, METHODS), strict=True):
        made = pipeline.quantize(*open_run(smoke.model_copy(update={"quantize": section}), tmp_path / method))
        assert made.distribution == found[method].distribution
        assert made.text == found[method].text
        assert made.identity == found[method].identity
    assert found["gptq"].distribution.forward_kl.value < found["minmax"].distribution.forward_kl.value


def test_compare_measures_each_method_once(smoke: Preset, tmp_path: Path) -> None:
    sections = app.with_methods(smoke, ["minmax"])
    first = pipeline.compare(*open_run(smoke, tmp_path), sections)
    assert pipeline.compare(*open_run(smoke, tmp_path), sections) == first, "the seconds would differ"
    again = pipeline.compare(*open_run(smoke, tmp_path), sections, force=True)
    assert again[0].distribution == first[0].distribution
    assert again[0].seconds_s != first[0].seconds_s


def test_compare_continues_in_a_folder_that_has_a_student(smoke: Preset, tmp_path: Path) -> None:
    pipeline.quantize(*open_run(smoke, tmp_path))
    before = load_student(tmp_path / "student", torch.device("cpu")).weights
    pipeline.compare(*open_run(smoke, tmp_path), app.with_methods(smoke, ["minmax"]))
    after = load_student(tmp_path / "student", torch.device("cpu")).weights
    assert all(torch.equal(before[name].codes, after[name].codes) for name in before)


def test_every_prompt_counts_once_before_any_counts_twice() -> None:
    rollouts = [Rollout(str(p), p, s, [1], [2], None, "stop", 0, 0, "teacher") for p in range(3) for s in range(2)]
    chosen = [(one.prompt_index, one.sample_index) for one in by_generation(rollouts, 99)]
    assert chosen == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def test_an_unknown_method_is_named(smoke: Preset) -> None:
    with pytest.raises(PresetError, match=r"no method 'minmix'"):
        app.with_methods(smoke, ["minmax", "minmix"])


def test_sqnr_is_that_of_all_weights_laid_end_to_end(teacher: PreTrainedModel, smoke: Preset) -> None:
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    weights = quantize_layers(teacher, names, smoke.quantize.model_copy(update={"method": "minmax"}))
    original = torch.cat([teacher.get_parameter(f"{name}.weight").detach().double().flatten() for name in names])
    noise = original - torch.cat([dense(weights[name]).double().flatten() for name in names])
    assert sqnr(teacher.get_parameter, weights) == pytest.approx(20 * math.log10(original.norm() / noise.norm()))
