"""The seam of post-training methods: one entry in a dict, its settings in the preset, nothing else to change."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kdctl.base.errors import PresetError
from kdctl.cli import app
from kdctl.config.preset import Preset, QuantizeSection
from kdctl.config.resolve import identity, load_preset
from kdctl.config.section import Section
from kdctl.formats.student import load_student
from kdctl.formats.verify import find_teacher, verify
from kdctl.model.folder import read_tensors
from kdctl.quant.affine import Grid, QParams, Weights, dequantize
from kdctl.quant.apply import quantize_each
from kdctl.quant.methods import QUANTIZERS
from kdctl.quant.quantizer import QuantizeContext, Quantizer
from kdctl.quant.scales import minmax
from kdctl.stages import pipeline
from kdctl.stages.context import open_run

FLAT = {  # what a preset.json held before a method had settings of its own
    "bits": 4,
    "group_size": 32,
    "symmetric": False,
    "method": "hqq",
    "calibration_source": "teacher",
    "calibration_sequences": 128,
    "damping": 0.01,
    "autoround_iters": 200,
    "skip": [],
}
RATIO = 0.9


def clipped(weight: Tensor, grid: Grid, dtype: torch.dtype) -> QParams:
    """Span nine tenths of each group's range."""
    found = minmax(weight, grid, dtype)
    return QParams((found.scale * RATIO).to(dtype), found.zero_point)


class Clipped(Quantizer):
    """Rounds to the nearest code of a range that is cut by a fixed ratio."""

    name = "clipped"
    needs = frozenset()
    settings = Section
    packages = ()

    def check(self, settings: QuantizeSection) -> None:
        if settings.symmetric:
            raise PresetError("quantize.method=clipped has no symmetric grid")

    def quantize(self, context: QuantizeContext) -> Weights:
        return quantize_each(context, clipped)


@pytest.fixture
def preset(smoke: Preset, monkeypatch: pytest.MonkeyPatch) -> Preset:
    """Add a method for one test and ask for it by name."""
    monkeypatch.setitem(QUANTIZERS, "clipped", Clipped())
    return smoke.model_copy(update={"quantize": app.with_methods(smoke, ["clipped"])[0]})


def test_a_method_is_one_entry(preset: Preset, tmp_path: Path) -> None:
    run = open_run(preset, tmp_path)
    report, folder = pipeline.quantize(*run), run.context.paths.student
    assert report.method == "clipped"
    for name, weight in load_student(folder, torch.device("cpu")).weights.items():
        original = run.teacher.load().get_parameter(f"{name}.weight").detach()
        scale = (minmax(original, weight.grid, torch.bfloat16).scale * RATIO).bfloat16()
        assert torch.equal(weight.qparams.scale, scale)
        value = dequantize(weight.codes, QParams(scale.double(), weight.qparams.zero_point), weight.grid)
        steps = (original.double() - value).abs().unflatten(-1, (-1, weight.grid.group_size)) / scale.unsqueeze(-1)
        inside = (weight.codes > 0) & (weight.codes < weight.grid.max_code)
        assert float(steps.flatten(-2)[inside].max()) <= 0.5 + 1e-5, "rounded to the nearest code"
    assert verify(folder, find_teacher(folder), torch.device("cpu")).passed
    assert pipeline.quantize(*open_run(preset, tmp_path)) == report, "the folder opens again and is complete"


def test_its_own_check_stands_before_any_work(preset: Preset, tmp_path: Path) -> None:
    symmetric = preset.model_copy(update={"quantize": preset.quantize.model_copy(update={"symmetric": True})})
    with pytest.raises(PresetError, match="no symmetric grid"):
        open_run(symmetric, tmp_path)


def test_methods_are_those_of_the_dict(smoke: Preset, preset: Preset) -> None:
    schema = Preset.model_json_schema()["$defs"]["QuantizeSection"]["properties"]["method"]
    assert schema["enum"] == ["autoround", "gptq", "hqq", "kl", "minmax"]
    assert all(name == quantizer.name for name, quantizer in QUANTIZERS.items())
    with pytest.raises(ValidationError, match="there are autoround, gptq, hqq, kl, minmax, clipped"):
        QuantizeSection(method="awq")


@pytest.mark.parametrize("changes", [{}, {"method": "gptq", "damping": 0.05}, {"method": "autoround"}, {"bits": 2}])
def test_students_are_identified_as_before_methods_had_settings(changes: dict[str, object], preset: Preset) -> None:
    flat, inputs = FLAT | changes, {"teacher": "f" * 64}
    text = {"stage": "quantize", "sections": {"quantize": flat, "dtype": "torch.bfloat16"}, "inputs": inputs}
    expected = hashlib.sha256(json.dumps(text, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]
    section = QuantizeSection.model_validate(flat)
    assert identity("quantize", {"quantize": section.decisive(), "dtype": "torch.bfloat16"}, inputs) == expected


def test_settings_of_other_methods_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    section = QuantizeSection(method="gptq")
    monkeypatch.setattr("kdctl.config.preset.IN_EVERY_IDENTITY", set())
    assert "damping" in section.decisive()
    assert "autoround_iters" not in section.decisive()


def test_old_spellings_still_reach_the_methods() -> None:
    preset = load_preset("smoke", {"quantize.damping": 0.5, "quantize.autoround_iters": 7})
    found = {name: preset.quantize.of(one.settings).model_dump() for name, one in QUANTIZERS.items()}
    assert found["kl"].pop("damping") == 0.5
    del found["kl"]
    assert found == {"autoround": {"autoround_iters": 7}, "gptq": {"damping": 0.5}, "hqq": {}, "minmax": {}}


def test_fields_that_two_methods_share_are_one() -> None:
    fields = [field for one in QUANTIZERS.values() for field in one.settings.model_fields.items()]
    for name, field in fields:
        inherited = QuantizeSection.model_fields[name]
        assert (inherited.annotation, inherited.default) == (field.annotation, field.default), name


@pytest.mark.slow
def test_the_documented_method_is_one_file(tiny_dir: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    for part in ("kdctl", "presets"):
        shutil.copytree(root / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    page = (root / "docs" / "guides" / "methods.md").read_text(encoding="utf-8")
    code = page.partition("```python\n# clipped.py\n")[2].partition("```")[0]
    (tmp_path / "kdctl" / "quant" / "methods" / "clipped.py").write_text(code, encoding="utf-8")
    options = ["--preset", "smoke", "--teacher", tiny_dir, "--method", "clipped", "--set", "quantize.clipped_ratio=0.8"]
    command = [sys.executable, "-m", "kdctl", "quantize", *options, "--run", tmp_path / "run", "--json"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "clipped"
    teacher = dict(read_tensors(tiny_dir))
    for name, weight in load_student(tmp_path / "run" / "student", torch.device("cpu")).weights.items():
        whole = minmax(teacher[f"{name}.weight"], weight.grid, torch.bfloat16).scale
        assert torch.equal(weight.qparams.scale, (whole * 0.8).to(torch.bfloat16))
