"""Row shards of weights, as FSDP2 makes them (layer 1).

FSDP2 (``torch.distributed.fsdp.fully_shard``) divides a weight along out_features, so every group along in_features
stays whole and the grid of a row needs nothing of the others.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdctl.quant.affine import QParams, QuantizedWeight


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor, any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(student: nn.Module, weights: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """Cut weights on the grid to the rows that this process has of a student's parameters."""
    return {name: _cut(weight, student.get_parameter(f"{name}.weight")) for name, weight in weights.items()}


def _cut(weight: QuantizedWeight, parameter: Tensor) -> QuantizedWeight:
    if not isinstance(parameter, DTensor):
        return weight
    count, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()

    def rows(tensor: Tensor) -> Tensor:
        parts = tensor.chunk(count)
        return parts[rank] if rank < len(parts) else tensor[:0]

    qparams = QParams(rows(weight.qparams.scale), rows(weight.qparams.zero_point))
    return replace(weight, codes=rows(weight.codes), qparams=qparams)
