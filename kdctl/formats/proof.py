"""The proof that every write passes: what a folder stores is the student in memory, read back tensor by tensor.

One layer is in memory beside the student at a time, and no second model. That three loaders make of such a folder what
is stored is proven by ``kdctl verify``.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from kdctl.base.errors import StoreError
from kdctl.formats.layout import Form, expected_tensors
from kdctl.formats.student import Student, packed_tensors, unpacked, unquantized_tensors
from kdctl.model.configuration import read_config
from kdctl.model.folder import StoredTensors
from kdctl.quant.affine import QuantizedWeight
from kdctl.quant.apply import dense


@torch.no_grad()
def prove(folder: Path, student: Student) -> str:
    """Compare every stored tensor with the student in memory. Raises StoreError naming the first that differs.

    Layers whose Q(W) is on meta are compared by their codes: processes that divided them compared these with Q(W).
    """
    config, stored = read_config(folder), StoredTensors(folder)
    expected = expected_tensors(config, folder)
    scheme = QuantizationScheme.model_validate(config.to_dict()["quantization_config"]["config_groups"]["group_0"])
    check_names(stored, expected)

    def equal(name: str, live: Tensor) -> Tensor:
        expected[name].check(name, found := stored[name])
        _same(name, found, live)
        return found

    for name, weight in student.weights.items():
        check_grid(name, weight)
        parts = {key: equal(key, tensor) for key, tensor in packed_tensors(name, weight).items()}
        values = dense(unpacked(name, parts, weight.grid))
        live = student.model.get_parameter(f"{name}.weight")
        _same(f"{name}.weight", values, dense(weight) if live.is_meta else live)
        if not torch.equal(decompressed(name, parts, scheme), values):
            raise StoreError(f"compressed-tensors decompresses {name} to other numbers than kdctl")
    for name, tensor in unquantized_tensors(student.model, student.weights).items():
        check_finite(name, equal(name, tensor))
    return f"{len(stored)} tensors are those of the student in memory, to the bit"


def check_names(stored: Mapping[str, Tensor], expected: Mapping[str, Form]) -> None:
    """Raise StoreError unless a folder stores the tensors that its configuration demands, and no others."""
    missing, strange = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    if missing or strange:
        raise StoreError(f"missing: {some(sorted(missing))}; not expected: {some(sorted(strange))}")


def check_grid(name: str, weight: QuantizedWeight) -> None:
    """Raise StoreError if a layer has a scale that is no scale, or a zero point that is no code."""
    scale, zero = weight.qparams.scale, weight.qparams.zero_point
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise StoreError(f"{name}.weight_scale has values that are not finite and positive")
    if int(zero.max()) > weight.grid.max_code:
        raise StoreError(f"{name}.weight_zero_point has values above {weight.grid.max_code}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise StoreError if a tensor of numbers has infinite ones or none at all."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise StoreError(f"{name} has values that are not finite")


def decompressed(name: str, parts: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """Decompress one stored layer as the package compressed-tensors does."""
    local = {key.removeprefix(f"{name}."): tensor for key, tensor in parts.items()}
    return PackedQuantizationCompressor.decompress(local, scheme)["weight"]


def some(names: list[str]) -> str:
    """Name the first few."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def _same(name: str, stored: Tensor, live: Tensor) -> None:
    if stored.dtype != live.dtype or not torch.equal(stored, live.to(stored.device)):
        raise StoreError(f"{name} is stored with other numbers than the student in memory has")
