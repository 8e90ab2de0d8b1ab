"""Models divided by rows among processes, as FSDP2 does it: loaded, trained, measured and written without a whole one.

FSDP2 (``torch.distributed.fsdp.fully_shard``) divides a weight along out_features, so every group along in_features
stays whole and the grid of a row needs nothing of the others. What is not quantized is whole in each process, and one
object in teacher and student.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers import PretrainedConfig, PreTrainedModel

from kdctl.base.errors import TrainingError
from kdctl.model.head import head_of
from kdctl.model.rows import frame, load_rows, put
from kdctl.model.sound import check_network
from kdctl.quant.affine import QParams, QuantizedWeight
from kdctl.quant.apply import dense, share_frozen
from kdctl.system.distributed import Processes, passes


def load_divided(
    folder: Path, dtype: torch.dtype, device: torch.device, names: Collection[str], processes: Processes
) -> PreTrainedModel:
    """Load a model for evaluation, of the named layers this process's rows, with the checks of ``load_model``.

    Raises ModelError, in all processes alike, where ``load_model`` does.
    """
    model, rows = processes.alike(lambda: load_rows(folder, dtype, device, names, processes.span))
    divide(model, rows, replace(processes, freed=True))  # nothing goes backward through it
    with passes():
        check_network(model)
    return model


def divided_student(
    teacher: PreTrainedModel, config: PretrainedConfig, weights: Mapping[str, QuantizedWeight], processes: Processes
) -> PreTrainedModel:
    """Build the student beside a divided teacher, whose other tensors it shares. weights: this process's rows."""
    student = without_layers(teacher, config, weights)
    divide(student, {f"{name}.weight": dense(weight) for name, weight in weights.items()}, processes)
    return student


def without_layers(
    model: PreTrainedModel, config: PretrainedConfig, weights: Mapping[str, QuantizedWeight]
) -> PreTrainedModel:
    """Return a model with all tensors of another but the quantized layers' weights, which are on meta."""
    found = frame(config, model.dtype)
    share_frozen(found, model, weights)
    for name, buffer in model.named_buffers():
        put(found, name, buffer)
    found.generation_config = model.generation_config
    return found


def divide(model: PreTrainedModel, rows: Mapping[str, Tensor], processes: Processes) -> None:
    """Divide weights that are on meta among processes, each of which gives its rows of them by parameter."""
    shard(model, [name.removesuffix(".weight") for name in rows], processes)
    state: dict[str, Tensor] = {}
    for name, part in rows.items():
        whole = cast(DTensor, model.get_parameter(name))
        state[name] = DTensor.from_local(
            part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    model.load_state_dict(state, strict=False, assign=True)


def shard(model: PreTrainedModel, names: Collection[str], processes: Processes) -> None:
    """Divide the named layers' weights among processes, a decoder layer being gathered at a time; the rest stays whole.

    Gradients are summed over processes in float32 and keep their dtype. Every process must run the same number of
    forward passes of ``base_model``.
    """
    weights = {f"{name}.weight" for name in names}
    rest = {parameter for name, parameter in model.named_parameters() if name not in weights}
    sizes = (processes.copies, processes.parts) if processes.copies > 1 else (processes.parts,)
    mesh = init_device_mesh(head_of(model).weight.device.type, sizes, mesh_dim_names=("copies", "rows")[-len(sizes) :])
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


@contextmanager
def gathered(model: nn.Module, freed: bool) -> Iterator[None]:
    """Hold all rows of a divided model in every process during a block, in which each runs it as often as it likes.

    freed: as in ``Processes``, how it is divided after the block.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with passes():
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(freed, recurse=False)
            part.reshard()


def free_gathered(model: nn.Module) -> None:
    """Let go of other processes' rows where passes left them, so that the next one gathers them as they are now."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor, any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return this process's rows of a tensor if a parameter is divided, else all of it."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=parameter.placements).to_local().clone()


def gathered_like(parameter: Tensor, rows: Tensor, length: int) -> Tensor:
    """Undo ``rows_like`` in every process. length: rows of all processes."""
    if not isinstance(parameter, DTensor):
        return rows
    shape = torch.Size((length, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh = parameter.device_mesh
    whole = DTensor.from_local(rows, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
    return whole.full_tensor()


def summed_like(parameter: Tensor, tensor: Tensor, copies: bool = True) -> Tensor:
    """Return this process's rows of a sum over the processes if a parameter is divided, else the tensor.

    copies: also over those of other copies of the model; else these are known to have the same.
    """
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    parts = [Partial() if copies else Replicate()] * (mesh.ndim - 1) + [Partial()]
    whole = DTensor.from_local(tensor, mesh, parts, run_check=False)
    return whole.redistribute(placements=parameter.placements).to_local()


def check_rows(student: nn.Module, weights: Mapping[str, QuantizedWeight], processes: Processes) -> None:
    """Raise TrainingError, in all processes alike, unless a divided student computes with exactly these rows."""

    def checked() -> None:
        for name, weight in weights.items():
            if not torch.equal(local(student.get_parameter(f"{name}.weight")), dense(weight)):
                raise TrainingError(f"{name} of the student in memory holds other numbers than its codes stand for")

    processes.alike(checked)


def whole_rows(
    weights: Iterable[tuple[str, QuantizedWeight]], processes: Processes
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Put rows together in the main process, on the CPU, a layer at a time; the others get what they gave."""
    for name, weight in weights:
        qparams = QParams(processes.whole(weight.qparams.scale), processes.whole(weight.qparams.zero_point))
        yield name, replace(weight, codes=processes.whole(weight.codes), qparams=qparams)
