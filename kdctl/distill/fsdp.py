"""Row shards of weights, as FSDP2 makes them.

FSDP2 (``torch.distributed.fsdp.fully_shard``) divides a weight along out_features, so every group along in_features
stays whole and the grid of a row needs nothing of the others.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from kdctl.quant.affine import QParams, QuantizedWeight
from kdctl.system.distributed import Processes


def shard(model: PreTrainedModel, names: Collection[str], processes: Processes) -> None:
    """Divide the named layers' weights among processes, a decoder layer being gathered at a time; the rest stays whole.

    Gradients are summed over processes in float32 and keep their dtype. Every process must run the same number of
    forward passes of ``base_model``.
    """
    weights = {f"{name}.weight" for name in names}
    rest = {parameter for name, parameter in model.named_parameters() if name not in weights}
    mesh = init_device_mesh(model.device.type, (processes.count,))
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    for part in [*layers, model.base_model]:
        shards = fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=processes.freed,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
            ignored_params=rest,
        )
        shards.set_gradient_divide_factor(1.0)
        shards.set_force_sum_reduction_for_comms(True)  # gloo has nothing else


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor, any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(student: nn.Module, weights: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """Cut weights on the grid to the rows that this process has of a student's parameters."""
    return {name: _cut(weight, student.get_parameter(f"{name}.weight")) for name, weight in weights.items()}


def whole_rows(
    weights: Iterable[tuple[str, QuantizedWeight]], processes: Processes
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Undo ``local_rows`` in the main process, on the CPU, a layer at a time; the others get what they gave."""
    for name, weight in weights:
        qparams = QParams(processes.whole(weight.qparams.scale), processes.whole(weight.qparams.zero_point))
        yield name, replace(weight, codes=processes.whole(weight.codes), qparams=qparams)


def _cut(weight: QuantizedWeight, parameter: Tensor) -> QuantizedWeight:
    if not isinstance(parameter, DTensor):
        return weight
    mesh = parameter.device_mesh
    rows = Processes(mesh.get_local_rank(), mesh.size(), sharded=True).rows
    qparams = QParams(rows(weight.qparams.scale), rows(weight.qparams.zero_point))
    offsets = None if weight.offsets is None else rows(weight.offsets)
    return replace(weight, codes=rows(weight.codes), qparams=qparams, offsets=offsets)
