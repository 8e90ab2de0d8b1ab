"""What a student folder must store, worked out from its configuration without a weight."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kdctl.base.errors import StoreError
from kdctl.formats.student import dense_config, dense_linears, quantization_config, stored_grid
from kdctl.model.load import linear_shapes, skeleton
from kdctl.quant.affine import Grid


@dataclass(frozen=True)
class Form:
    """What a stored tensor must look like. values: its content, where that is fixed too."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: tuple[int, ...] | None = None

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise StoreError if a stored tensor is another one."""
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise StoreError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {self.shape} {self.dtype}")
        if self.values is not None and tuple(tensor.tolist()) != self.values:
            raise StoreError(f"{name} says {tuple(tensor.tolist())}, not {self.values}")


def expected_tensors(config: PretrainedConfig, folder: Path) -> dict[str, Form]:
    """List every tensor that a student folder of this configuration stores. Raises StoreError for other folders."""
    grid = stored_grid(config, folder)
    ignored = set(config.to_dict()["quantization_config"]["ignore"])
    dense = dense_config(config)
    model, dtype = skeleton(dense), _number_format(dense)
    quantized = {name: shape for name, shape in linear_shapes(model).items() if name not in ignored}
    found = _dense_forms(model, dtype, {f"{name}.weight" for name in quantized})
    _check_description(config, grid, dense_linears(model, quantized))
    for name, (rows, columns) in quantized.items():
        if columns % grid.group_size:
            raise StoreError(f"group size {grid.group_size} does not divide in_features={columns} of {name}")
        found |= {f"{name}.weight_{part}": form for part, form in _packed_forms(rows, columns, grid, dtype).items()}
    return found


def _check_description(config: PretrainedConfig, grid: Grid, ignored: list[str]) -> None:
    """Raise StoreError if other programs are told something else of the quantization than kdctl writes."""
    stored, written = config.to_dict()["quantization_config"], quantization_config(grid, ignored)
    for key, value in written.items():
        same = set(stored.get(key, ())) == set(value) if key == "ignore" else stored.get(key) == value
        if not same:
            raise StoreError(f"quantization_config.{key} in config.json is {stored.get(key)!r}, not {value!r}")


def _number_format(config: PretrainedConfig) -> torch.dtype:
    """Return the number format that a configuration names."""
    if not isinstance(config.dtype, torch.dtype):
        raise StoreError(f"config.json names no number format (dtype is {config.dtype!r})")
    return config.dtype


def _dense_forms(model: PreTrainedModel, dtype: torch.dtype, quantized: set[str]) -> dict[str, Form]:
    """Describe the tensors outside the quantized layers, tied ones once."""
    found: dict[str, Form] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in quantized and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = Form(tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)
    return found


def _packed_forms(rows: int, columns: int, grid: Grid, dtype: torch.dtype) -> dict[str, Form]:
    """Describe the stored tensors of one quantized layer."""
    groups = columns // grid.group_size
    forms = {
        "packed": Form((rows, -(-columns * grid.bits // 32)), torch.int32),
        "scale": Form((rows, groups), dtype),
        "shape": Form((2,), torch.int64, (rows, columns)),
    }
    if not grid.symmetric:
        forms["zero_point"] = Form((-(-rows * grid.bits // 32), groups), torch.int32)
    return forms
