"""Student folders: what is in memory, what kdctl loads and what transformers loads are the same numbers."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError, StoreError
from kdctl.config.preset import QuantizeSection
from kdctl.formats import student as checkpoint
from kdctl.formats.student import Student, load_student, packed_tensors, read_rows, unpacked
from kdctl.model.configuration import read_config
from kdctl.model.folder import read_tensors
from kdctl.model.load import linear_shapes, skeleton
from kdctl.model.tokenizer import load_tokenizer
from kdctl.quant.affine import Grid
from kdctl.quant.apply import dense
from kdctl.run.files import sha256
from kdctl.run.records import QuantizeReport
from kdctl.system.distributed import Processes

SaveStudent = Callable[[PreTrainedModel, QuantizeSection, Path], Student]
Quantized = Callable[[PreTrainedModel, QuantizeSection], Student]
KINDS = [(bits, symmetric) for bits in (2, 3, 4) for symmetric in (False, True)] + [(8, True)]
CPU = torch.device("cpu")
GRID = {"num_bits": 4, "group_size": 16, "symmetric": False}
SETTINGS = QuantizeSection(group_size=16, method="minmax")


def settings_of(bits: int, symmetric: bool, method: str, group_size: int = 16) -> QuantizeSection:
    values = {"bits": bits, "symmetric": symmetric, "method": method, "group_size": group_size}
    return QuantizeSection.model_validate(values)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    return model(ids).logits


def assert_same_model(found: PreTrainedModel, expected: PreTrainedModel):
    mine, theirs = found.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    assert torch.equal(logits(found), logits(expected))


@pytest.fixture
def folder(teacher: PreTrainedModel, save: SaveStudent, tmp_path: Path) -> Path:
    """Write one student folder."""
    save(teacher, SETTINGS, tmp_path / "student")
    return tmp_path / "student"


def flip_byte(path: Path, position: int):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x01
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("bits", "symmetric", "method", "fixture"),
    [
        *[(*kind, "minmax", "teacher") for kind in KINDS],
        (4, False, "hqq", "untied"),
        (3, True, "hqq", "teacher"),
        (3, False, "minmax", "untied"),
    ],
)
def test_memory_kdctl_and_transformers_agree_to_the_bit(
    request: pytest.FixtureRequest,
    save: SaveStudent,
    tmp_path: Path,
    bits: int,
    symmetric: bool,
    method: str,
    fixture: str,
):
    settings = settings_of(bits, symmetric, method, group_size=8)
    student = save(request.getfixturevalue(fixture), settings, tmp_path / "student")
    loaded = load_student(tmp_path / "student", CPU)
    assert_same_model(loaded.model, student.model)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16), student.model)
    assert loaded.weights.keys() == student.weights.keys()
    for name, weight in student.weights.items():
        assert torch.equal(loaded.weights[name].codes, weight.codes)
        assert torch.equal(loaded.weights[name].qparams.scale, weight.qparams.scale)
        assert torch.equal(loaded.weights[name].qparams.zero_point, weight.qparams.zero_point)
        assert loaded.weights[name].grid == weight.grid


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_agree_to_the_bit_too(
    teacher_fp32: PreTrainedModel, save: SaveStudent, tmp_path: Path, dtype: torch.dtype
):
    student = save(teacher_fp32.to(dtype), SETTINGS, tmp_path / "student")  # pyright: ignore[reportArgumentType]
    assert_same_model(load_student(tmp_path / "student", CPU).model, student.model)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=dtype), student.model)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_stored_layer_decompresses_with_compressed_tensors(
    untied: PreTrainedModel, quantized: Quantized, bits: int, symmetric: bool
):
    weights = quantized(untied, settings_of(bits, symmetric, "minmax", group_size=8)).weights
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=QuantizationStrategy.GROUP, group_size=8)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    for name, weight in weights.items():
        stored = packed_tensors(name, weight)
        local = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items()}
        assert ("weight_zero_point" in local) == (not symmetric)
        assert torch.equal(PackedQuantizationCompressor.decompress(local, scheme)["weight"], dense(weight))
        again = unpacked(name, stored, weight.grid)
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.qparams.zero_point, weight.qparams.zero_point)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (3, False), (4, True)])
def test_rows_of_all_processes_are_the_layers(
    untied: PreTrainedModel, save: SaveStudent, tmp_path: Path, bits: int, symmetric: bool
):
    student = save(untied, settings_of(bits, symmetric, "minmax", group_size=8), tmp_path / "student")
    parts = [read_rows(tmp_path / "student", CPU, Processes(rank, 5, sharded=True).span) for rank in range(5)]
    for part in parts:
        assert part.weights.keys() == student.weights.keys()
        own, expected = (one.to_dict() for one in (part.config, load_student(tmp_path / "student", CPU).model.config))
        assert own | {"_name_or_path": ""} == expected | {"_name_or_path": ""}
    for name, weight in student.weights.items():
        rows = [part.weights[name] for part in parts]
        assert torch.equal(torch.cat([one.codes for one in rows]), weight.codes)
        assert torch.equal(torch.cat([one.qparams.scale for one in rows]), weight.qparams.scale)
        assert torch.equal(torch.cat([one.qparams.zero_point for one in rows]), weight.qparams.zero_point)


@pytest.mark.parametrize("fixture", ["teacher", "untied"])
def test_embeddings_stay_tied_or_untied(
    request: pytest.FixtureRequest, save: SaveStudent, tmp_path: Path, fixture: str
):
    settings = SETTINGS.model_copy(update={"group_size": 8})
    save(request.getfixturevalue(fixture), settings, tmp_path / "student")
    stored = dict(read_tensors(tmp_path / "student"))
    assert ("lm_head.weight" in stored) == (fixture == "untied")
    loaded = load_student(tmp_path / "student", CPU).model
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head is not None
    assert (head.weight is embedding.weight) == (fixture == "teacher")


def test_skipped_layers_are_ignored_and_keep_the_teachers_weight(
    teacher: PreTrainedModel, save: SaveStudent, tmp_path: Path
):
    settings = SETTINGS.model_copy(update={"skip": ("*.mlp.down_proj", "*.k_proj")})
    student = save(teacher, settings, tmp_path / "student")
    skipped = [name for name in linear_shapes(teacher) if name.endswith(("down_proj", "k_proj"))]
    assert len(skipped) == 4
    config = json.loads((tmp_path / "student" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", *skipped}
    loaded = load_student(tmp_path / "student", CPU)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    assert_same_model(plain, student.model)
    assert loaded.weights.keys().isdisjoint(skipped)
    for name in skipped:
        weight = teacher.get_parameter(f"{name}.weight")
        assert torch.equal(loaded.model.get_parameter(f"{name}.weight"), weight)
        assert torch.equal(plain.get_parameter(f"{name}.weight"), weight)


def test_saving_a_loaded_student_again_changes_no_stored_number(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    stored = json.loads((folder / "quantize.json").read_text())
    report = QuantizeReport.model_construct(**stored | {"skip": tuple(stored["skip"])})
    heldout = pq.read_table(folder / checkpoint.HELDOUT)
    student = load_student(folder, CPU)
    checkpoint.save_student(tmp_path / "again", student, tokenizer, report, heldout, lambda _: "a card")
    for path in folder.iterdir():
        assert sha256(path) == sha256(tmp_path / "again" / path.name), path.name


def test_folder_is_complete_and_says_its_size(folder: Path, tokenizer: PreTrainedTokenizerBase):
    assert pq.read_table(folder / checkpoint.HELDOUT).to_pydict() == {"tokens": [1.0]}
    assert load_tokenizer(folder).chat_template == tokenizer.chat_template
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert json.loads((folder / "quantize.json").read_text())["student_bytes"] == size


def test_generation_settings_travel_with_the_student(teacher: PreTrainedModel, save: SaveStudent, tmp_path: Path):
    assert teacher.generation_config is not None
    teacher.generation_config.eos_token_id = [258, 65]
    save(teacher, SETTINGS, tmp_path / "student")
    found = load_student(tmp_path / "student", CPU).model.generation_config
    assert found is not None
    assert found.eos_token_id == [258, 65]


def test_loaded_student_is_frozen_and_in_evaluation_mode(folder: Path):
    model = load_student(folder, CPU).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum command here")
def test_sums_cover_every_file_and_sha256sum_accepts_them(folder: Path):
    listed = [line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert sorted(listed) == sorted(present - {"SHA256SUMS"})
    result = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("position", [0, 8, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_one_flipped_byte_is_noticed(folder: Path, name: str, position: int):
    flip_byte(folder / name, position)
    with pytest.raises(StoreError, match=name):
        load_student(folder, CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_missing_file_is_noticed(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(StoreError, match=name):
        load_student(folder, CPU)


@pytest.mark.parametrize("position", [0, 63, 64, 65, 66, -2])
def test_one_flipped_byte_of_the_sums_is_noticed(folder: Path, position: int):
    flip_byte(folder / "SHA256SUMS", position)
    with pytest.raises(StoreError, match="SHA256SUMS"):
        load_student(folder, CPU)


def test_sums_that_are_not_text_are_noticed(folder: Path):
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(StoreError, match="SHA256SUMS"):
        load_student(folder, CPU)


@pytest.mark.parametrize("keep", [0, 2])
def test_sums_cut_short_are_noticed(folder: Path, keep: int):
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(lines[:keep]))
    with pytest.raises(StoreError, match="SHA256SUMS"):
        load_student(folder, CPU)


def test_shard_that_the_sums_do_not_know_is_noticed(folder: Path):
    shutil.copy(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    with pytest.raises(StoreError, match="model-00002-of-00002"):
        load_student(folder, CPU)


def test_a_file_may_be_added_to_a_folder(folder: Path):
    (folder / "NOTES.md").write_text("a note")
    assert load_student(folder, CPU).weights


def test_teacher_folder_is_not_a_student(tiny_dir: Path, tmp_path: Path):
    shutil.copytree(tiny_dir, tmp_path / "teacher")
    checkpoint.write_sums(tmp_path / "teacher")
    with pytest.raises(StoreError, match="not a pack-quantized student folder"):
        load_student(tmp_path / "teacher", CPU)


def test_student_is_not_taken_for_a_teacher(folder: Path):
    with pytest.raises(ModelError, match="already quantized"):
        skeleton(read_config(folder))


def test_failed_save_leaves_the_old_folder(
    folder: Path, teacher: PreTrainedModel, save: SaveStudent, monkeypatch: pytest.MonkeyPatch
):
    before = (folder / "SHA256SUMS").read_text()

    def fail(_: Path):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "write_sums", fail)
    with pytest.raises(OSError, match="disk full"):
        save(teacher, SETTINGS.model_copy(update={"bits": 3}), folder)
    assert (folder / "SHA256SUMS").read_text() == before
    assert load_student(folder, CPU).weights
    with pytest.raises(OSError, match="disk full"):
        save(teacher, SETTINGS, folder.parent / "new")
    assert [path.name for path in folder.parent.iterdir()] == ["student"]


@pytest.mark.parametrize(
    "groups",
    [{}, [], {"group_1": {}}, {"group_0": None}]
    + [{"group_0": {"weights": GRID | bad}} for bad in ({"num_bits": 5}, {"group_size": None}, {"symmetric": "no!"})],
)
def test_a_scheme_that_is_no_grid_is_refused(folder: Path, groups: object):
    config = read_config(folder)
    stored = config.to_dict()["quantization_config"] | {"config_groups": groups}
    config.quantization_config = stored  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(StoreError, match="group_0 of its config"):
        checkpoint.stored_grid(config, folder)


def test_stored_scheme_is_the_grid(folder: Path, teacher: PreTrainedModel):
    config = read_config(folder)
    assert checkpoint.stored_grid(config, folder) == Grid(4, 16, False)
    assert checkpoint.dense_config(config).to_dict() == {
        **teacher.config.to_dict(),
        "_name_or_path": config.to_dict()["_name_or_path"],
    }
