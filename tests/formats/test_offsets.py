"""Where weights were in their cells, on disk."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kdctl.base.errors import StoreError
from kdctl.formats.offsets import FILE, offsets_sum, save_offsets, with_offsets
from kdctl.formats.student import write_sums
from kdctl.quant.affine import Grid, QuantizedWeight
from kdctl.quant.scales import minmax, quantize_weight


def weights() -> dict[str, QuantizedWeight]:
    made = quantize_weight(torch.randn(8, 64), minmax, Grid(4, 32, False), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    return {
        name: replace(made, offsets=torch.randint(-127, 128, (8, 64), generator=generator, dtype=torch.int8))
        for name in ("a", "b")
    }


def bare(found: dict[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    return {name: replace(weight, offsets=None) for name, weight in found.items()}


def test_offsets_come_back_to_the_student_that_they_are_of(tmp_path: Path) -> None:
    given, folder = weights(), tmp_path / "offsets"
    save_offsets(folder, given, "mine")
    assert offsets_sum(folder, "mine") is not None
    for name, weight in with_offsets(folder, bare(given), "mine").items():
        assert weight.offsets is not None
        assert weight.offsets.tolist() == given[name].offsets.tolist()  # pyright: ignore[reportOptionalMemberAccess]
    assert offsets_sum(folder, "another") is offsets_sum(tmp_path / "none", "mine") is None
    assert all(weight.offsets is None for weight in with_offsets(folder, bare(given), "another").values())


def test_a_method_without_offsets_leaves_none_of_the_student_before(tmp_path: Path) -> None:
    save_offsets(tmp_path / "offsets", weights(), "mine")
    save_offsets(tmp_path / "offsets", bare(weights()), "mine")
    assert list(tmp_path.iterdir()) == []


def test_damaged_offsets_are_refused(tmp_path: Path) -> None:
    save_offsets(tmp_path / "offsets", weights(), "mine")
    data = bytearray((tmp_path / "offsets" / FILE).read_bytes())
    data[-5] ^= 1
    (tmp_path / "offsets" / FILE).write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        with_offsets(tmp_path / "offsets", weights(), "mine")


def test_a_folder_without_what_it_should_hold_is_refused_or_of_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "offsets"
    save_offsets(folder, weights(), "mine")
    (folder / FILE).unlink()
    with pytest.raises(StoreError, match="kdctl quantize --force"):
        offsets_sum(folder, "mine")
    save_file({"a": torch.zeros(1)}, folder / FILE)
    write_sums(folder)
    assert offsets_sum(folder, "mine") is None
