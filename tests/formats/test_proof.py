"""The proof of a new folder: everything stored is compared with the student in memory, and any difference is named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.base.errors import StoreError
from kdctl.config.preset import QuantizeSection
from kdctl.formats.proof import prove
from kdctl.formats.student import Student

SaveStudent = Callable[[PreTrainedModel, QuantizeSection, Path], Student]
LAYER = "model.layers.1.mlp.up_proj"


def settings_of(bits: int, symmetric: bool) -> QuantizeSection:
    return QuantizeSection(bits=bits, symmetric=symmetric, group_size=8, method="minmax")  # pyright: ignore


@pytest.fixture
def made(untied: PreTrainedModel, save: SaveStudent, tmp_path: Path) -> tuple[Path, Student]:
    """Write the folder of a student whose sizes fill no whole words; return it with the student."""
    return tmp_path / "student", save(untied, settings_of(3, False), tmp_path / "student")


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change what a folder stores."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_faithful_folder_passes_on_every_grid(untied: PreTrainedModel, save: SaveStudent, tmp_path: Path) -> None:
    for bits, symmetric in ((2, False), (3, True), (3, False), (4, False), (8, True)):
        folder = tmp_path / f"{bits}{symmetric}"
        student = save(untied, settings_of(bits, symmetric), folder)
        stored = len(load_file(folder / "model.safetensors"))
        assert prove(folder, student).startswith(f"{stored} tensors are those of the student")


def test_any_stored_number_that_differs_is_named(made: tuple[Path, Student]) -> None:
    folder, student = made
    whole = load_file(folder / "model.safetensors")
    for name in (
        *(f"{LAYER}.weight_{part}" for part in ("packed", "scale", "zero_point")),
        *("model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"),
    ):
        place = -1 if name.endswith("packed") else 0  # bits that fill up a word count too
        edited(folder, lambda tensors, name=name, place=place: _flip_last_bit(tensors[name], place))
        with pytest.raises(StoreError, match=name.replace(".", r"\.")):
            prove(folder, student)
        save_file(whole, folder / "model.safetensors", {"format": "pt"})
    assert prove(folder, student)


def _flip_last_bit(tensor: Tensor, place: int) -> None:
    """Change one number of a tensor by its last bit."""
    bits = tensor.view(-1).view(torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype)
    bits[place] ^= 1


def test_missing_and_strange_tensors_are_named(made: tuple[Path, Student]) -> None:
    folder, student = made
    edited(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(StoreError, match=r"missing: model\.norm\.weight; not expected: none"):
        prove(folder, student)
    edited(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48), "extra": torch.ones(1)}))
    with pytest.raises(StoreError, match=r"not expected: extra"):
        prove(folder, student)


def test_a_live_weight_that_is_not_what_its_codes_say_is_refused(made: tuple[Path, Student]) -> None:
    folder, student = made
    with torch.no_grad():
        student.model.get_parameter(f"{LAYER}.weight")[3, 5] += 1
    with pytest.raises(StoreError, match=rf"{LAYER}\.weight is stored with other numbers"):
        prove(folder, student)


def test_a_student_off_its_grid_is_refused_however_faithfully_it_is_stored(made: tuple[Path, Student]) -> None:
    folder, student = made
    weight = student.weights[LAYER]
    for scale, zero, said in (
        (-weight.qparams.scale, weight.qparams.zero_point, "not finite and positive"),
        (weight.qparams.scale * torch.inf, weight.qparams.zero_point, "not finite and positive"),
        (weight.qparams.scale, weight.qparams.zero_point + 8, "values above 7"),
    ):
        student.weights[LAYER] = replace(weight, qparams=replace(weight.qparams, scale=scale, zero_point=zero))
        with pytest.raises(StoreError, match=said):
            prove(folder, student)
