"""AutoRound on the shipping grid. What runs auto-round itself is skipped where that is not installed."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from kdctl.base.errors import ModelError, PresetError
from kdctl.config.preset import DistillSection, Preset, QuantizeSection
from kdctl.distill.shadow import make_shadow
from kdctl.formats.verify import find_teacher, verify
from kdctl.model.batch import Batch, collate
from kdctl.model.folder import fingerprint
from kdctl.model.load import load_model
from kdctl.quant import autoround as module
from kdctl.quant.affine import Grid, QParams, QuantizedWeight, quantize
from kdctl.quant.apply import build_student, dense, quantize_layers, select_layers
from kdctl.quant.autoround import RESULT, Task, autoround, on_grid, rectangle
from kdctl.quant.methods.autoround import INSTALL
from kdctl.quant.scales import minmax, quantize_weight
from kdctl.rollout.store import RolloutStore
from kdctl.run.records import Rollout
from kdctl.stages import pipeline
from kdctl.stages.context import open_run

GRIDS = [Grid(4, 32, False), Grid(4, 32, True), Grid(3, 64, False), Grid(2, 32, True), Grid(8, 64, True)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SKIP = "model.layers.1.mlp.down_proj"
ITERS = 30
Tuned = dict[str, QuantizedWeight]


def random_batches(seed: int = 0) -> list[Batch]:
    """Return batches of random bytes with rows and widths of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [12, 17, 20, 20, 24, 29, 31, 33, 36, 40, 40, 40]
    rows = [torch.randint(0, 256, (length,), generator=draw).tolist() for length in lengths]
    rollouts = [Rollout("", i, 0, row[:5], row[5:], None, "length", 0, 0, "teacher") for i, row in enumerate(rows)]
    return [collate(rollouts[:6], 64), collate(rollouts[6:], 64)]


def task_for(teacher: PreTrainedModel, folder: Path, seed: int = 0, **changes: object) -> Task:
    """Describe the quantization of a tiny teacher."""
    settings = QuantizeSection.model_validate(
        {"group_size": 32, "method": "autoround", "autoround_iters": ITERS, "skip": (SKIP,)} | changes
    )
    dtype = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[teacher.dtype]
    names = tuple(select_layers(teacher, settings))
    return Task.model_validate(
        {"teacher": folder, "dtype": dtype, "device": "cpu", "settings": settings, "names": names, "seed": seed}
    )


# --- without auto-round -----------------------------------------------------------------------------------------------


def weight_on(grid: Grid, dtype: torch.dtype) -> QuantizedWeight:
    """Return a random weight whose codes are not those of rounding anything to the nearest."""
    torch.manual_seed(0)
    qparams = quantize_weight(torch.randn(24, 128) * 0.05, minmax, grid, dtype).qparams
    return QuantizedWeight(torch.randint(0, grid.max_code + 1, (24, 128), dtype=torch.uint8), qparams, grid)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_come_back_from_the_dequantized_weight(grid: Grid, dtype: torch.dtype) -> None:
    given = weight_on(grid, dtype)
    product = (given.codes.double() - given.qparams.zero_point.double().repeat_interleave(grid.group_size, 1)) * (
        given.qparams.scale.double().repeat_interleave(grid.group_size, 1)
    )
    for weight in (dense(given), product.float()):  # auto-round keeps the product in float32 for fp16 teachers
        found = on_grid("a", weight, given.qparams, grid)
        assert torch.equal(found.codes, given.codes)


@pytest.mark.parametrize("damage", ["weight", "scale", "zero point", "range"])
def test_a_weight_off_the_grid_is_refused_with_its_distance(damage: str) -> None:
    grid = Grid(4, 32, False)
    given = weight_on(grid, torch.bfloat16)
    weight, scale, zero = dense(given).clone(), given.qparams.scale.clone(), given.qparams.zero_point.clone()
    if damage == "weight":
        weight[3, 5] += 0.3 * float(scale[3, 0])
    elif damage == "scale":
        scale[2, 1] *= 1.02
    elif damage == "zero point":
        zero[0, 0] = 16 - zero[0, 0] if zero[0, 0] != 8 else 15
    else:
        weight[7, 9] = 17 * float(scale[7, 0])
    with pytest.raises(ModelError, match=r"weight of a\.b is up to \d\.\d\de-\d\d of its largest") as error:
        on_grid("a.b", weight, QParams(scale, zero), grid)
    assert INSTALL in str(error.value)


def test_calibration_rows_are_one_rectangle_with_masks_from_lengths() -> None:
    batches = random_batches()
    found = rectangle(batches)
    assert found["input_ids"].shape == found["attention_mask"].shape == (12, 40)
    expected = [row for batch in batches for row in batch.input_ids.split(batch.seq_lens)]
    for row, ids, mask in zip(expected, found["input_ids"], found["attention_mask"], strict=True):
        assert torch.equal(ids[: len(row)], row)
        assert int(mask.sum()) == int(mask[: len(row)].sum()) == len(row)
        assert not ids[len(row) :].any()


def absent(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line where auto-round cannot be found, installed or not."""
    code = "import sys; sys.modules['auto_round'] = None; from kdctl.cli.app import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_missing_package_is_one_message_before_any_work(tmp_path: Path) -> None:
    done = absent("quantize", "--preset", "smoke", "--method", "autoround", "--run", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: quantize.method=autoround needs the package auto-round, which is not installed; install it: "
        'pip install "kdctl[autoround]"\n'
    )
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_a_student_that_is_there_needs_no_package(
    smoke: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "auto_round", None)
    section = smoke.quantize.model_copy(update={"method": "autoround"})
    preset = smoke.model_copy(update={"quantize": section})
    with pytest.raises(PresetError, match="needs the package auto-round"):
        open_run(preset, tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "quantize.json").write_text("{}")
    assert open_run(preset, tmp_path).context.preset.quantize == preset.quantize


def test_a_layer_that_was_left_out_is_named(
    teacher: PreTrainedModel, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_for(teacher, tiny_dir)

    def run(folder: Path, _: object) -> None:
        given = quantize_weight(teacher.get_parameter(f"{task.names[0]}.weight"), minmax, GRIDS[0], torch.bfloat16)
        parts = {"weight": dense(given), "scale": given.qparams.scale, "zero_point": given.qparams.zero_point.float()}
        save_file({f"{task.names[0]}.{part}": tensor for part, tensor in parts.items()}, folder / RESULT)

    monkeypatch.setattr(module, "_run", run)
    with pytest.raises(ModelError, match=rf"left {len(task.names) - 1} layers in full precision \({task.names[1]}, "):
        autoround(task, random_batches())


@pytest.mark.slow
def test_a_failure_shows_its_last_words(
    teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"auto-round ended with exit code 1; its last lines:\n(.*\n)*\w+.*Error: "):
        autoround(task_for(teacher, tmp_path), random_batches())


# --- with auto-round --------------------------------------------------------------------------------------------------


# found, not imported: auto-round patches transformers, and other tests run in this process
real = pytest.mark.skipif(find_spec("auto_round") is None, reason="auto-round is not installed; it is an extra")


@pytest.fixture(scope="module")
def tuned(tiny_dir: Path) -> Tuned:
    """Run auto-round on the tiny teacher, once for several tests."""
    teacher = load_model(tiny_dir, torch.bfloat16, torch.device("cpu"))
    return autoround(task_for(teacher, tiny_dir), random_batches())


@torch.no_grad()
def divergence(teacher: PreTrainedModel, weights: Tuned) -> float:
    """Return the mean KL(teacher‖student) over the calibration tokens."""
    student, total, count = build_student(teacher, weights), 0.0, 0
    for batch in random_batches():
        for row in batch.input_ids.split(batch.seq_lens):
            p, q = (model(input_ids=row[None]).logits.double().log_softmax(-1) for model in (teacher, student))
            total += float((p.exp() * (p - q)).sum())
            count += len(row)
    return total / count


@real
@pytest.mark.slow
def test_result_is_a_student_on_the_grid_that_training_starts_from(teacher: PreTrainedModel, tuned: Tuned) -> None:
    settings = QuantizeSection(group_size=32, skip=(SKIP,))
    assert list(tuned) == select_layers(teacher, settings)
    for weight in tuned.values():
        assert weight.grid == Grid(4, 32, False)
        assert weight.qparams.scale.dtype == torch.bfloat16
        assert bool((weight.qparams.scale > 0).all())
        assert int(weight.codes.max()) <= 15
        assert int(weight.qparams.zero_point.max()) <= 15
    student = build_student(teacher, tuned)
    for name, weight in tuned.items():
        assert torch.equal(student.get_parameter(f"{name}.weight"), dense(weight))
    assert student.get_parameter(f"{SKIP}.weight") is teacher.get_parameter(f"{SKIP}.weight")
    shadow = make_shadow(DistillSection(), student, tuned, teacher)
    shadow.write_back()
    for name, weight in shadow.quantized():
        assert torch.equal(weight.codes, tuned[name].codes)
        assert torch.equal(student.get_parameter(f"{name}.weight"), dense(tuned[name]))


@real
@pytest.mark.slow
def test_it_comes_closer_to_the_teacher_than_min_max(teacher: PreTrainedModel, tuned: Tuned) -> None:
    minmax = quantize_layers(teacher, list(tuned), QuantizeSection(group_size=32, method="minmax"))
    assert divergence(teacher, tuned) < 0.7 * divergence(teacher, minmax)
    for name, weight in tuned.items():
        nearest = quantize(teacher.get_parameter(f"{name}.weight"), weight.qparams, weight.grid)
        assert float((nearest != weight.codes).float().mean()) > 0.01, "rounded to the nearest: it was not tuned"


@real
@pytest.mark.slow
def test_equal_seeds_give_equal_students_and_nothing_leaks(
    teacher: PreTrainedModel, tiny_dir: Path, tuned: Tuned
) -> None:
    before, files, state = dict(teacher.state_dict()), fingerprint(tiny_dir), torch.get_rng_state()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    variables, done = dict(os.environ), []
    again = autoround(task_for(teacher, tiny_dir), random_batches(), lambda *bar: done.append(bar))
    assert done[-1] == (2, 2)
    assert "auto_round" not in sys.modules
    assert dict(os.environ) == variables
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(tiny_dir) == files
    assert all(torch.equal(kept[name], tensor) for name, tensor in teacher.state_dict().items())
    for name, weight in tuned.items():
        assert torch.equal(weight.codes, again[name].codes)
        assert torch.equal(weight.qparams.scale, again[name].qparams.scale)
        assert torch.equal(weight.qparams.zero_point, again[name].qparams.zero_point)
    other = autoround(task_for(teacher, tiny_dir, seed=1), random_batches())
    assert any(not torch.equal(weight.codes, other[name].codes) for name, weight in tuned.items())


@real
@pytest.mark.slow
def test_symmetric_grids_are_ours_in_float32(teacher_fp32: PreTrainedModel, tiny_dir_fp32: Path) -> None:
    found = autoround(task_for(teacher_fp32, tiny_dir_fp32, bits=3, symmetric=True), random_batches())
    for weight in found.values():
        assert weight.grid == Grid(3, 32, True)
        assert weight.qparams.scale.dtype == torch.float32
        assert bool((weight.qparams.scale > 0).all())
        assert bool((weight.qparams.zero_point == 4).all())
        assert int(weight.codes.max()) <= 7
    settings = QuantizeSection(bits=3, group_size=32, symmetric=True, method="minmax")
    minmax = quantize_layers(teacher_fp32, list(found), settings)
    assert divergence(teacher_fp32, found) < 0.8 * divergence(teacher_fp32, minmax)


@real
@pytest.mark.slow
def test_quantize_calibrates_on_the_store_and_writes_a_proven_folder(smoke: Preset, tmp_path: Path) -> None:
    section = smoke.quantize.model_copy(update={"method": "autoround", "autoround_iters": 5})
    job = open_run(smoke.model_copy(update={"quantize": section}), tmp_path)
    report = pipeline.quantize(*job)
    assert (report.method, report.versions.quantizers["auto-round"]) == ("autoround", version("auto-round"))
    assert RolloutStore(job.context.paths.rollouts("teacher")).manifest_path.exists()
    assert verify(job.context.paths.student, find_teacher(job.context.paths.student), torch.device("cpu")).passed


@pytest.mark.slow
def test_modules_in_the_working_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random", "torch", "auto_round", "kdctl"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task").mkdir()
    with pytest.raises(ModelError, match=r"No such file.*task\.json"):
        module._run(tmp_path / "task", lambda done, total: None)
    assert not (tmp_path / "ran").exists()
