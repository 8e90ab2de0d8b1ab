"""A model folder of which a process reads some rows only: those of the layers that processes divide.

What lies outside these layers is whole. It is loaded without transformers, which would read all of every tensor, and
with the checks of whole loading.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from kdctl.base.errors import ModelError
from kdctl.model.absent import check_no_adapter
from kdctl.model.configuration import read_config
from kdctl.model.folder import StoredTensors
from kdctl.model.load import check_complete, check_stored, check_tied, skeleton
from kdctl.model.sound import check_weights
from kdctl.system.cpu_products import widen_products
from kdctl.system.distributed import parameters_on_meta

Span = Callable[[int], slice]
"""Tells which of so many rows are read."""


def load_rows(
    folder: Path, dtype: torch.dtype, device: torch.device, names: Collection[str], span: Span
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Load a model for evaluation, but for the named layers' weights: they stay on meta, and their rows come beside it.

    Returns the model, and the rows by the name of their parameter. Raises ModelError if tensors are missing, left over
    or not finite.
    """
    check_no_adapter(folder)
    model = frame(read_config(folder), dtype)
    stored = network_tensors(folder, model)
    check_complete(folder, _differences(model, stored))
    check_stored(folder, model)
    divided = [f"{name}.weight" for name in names]
    for same in _tied(model):
        if same.keys().isdisjoint(divided):
            _read(model, stored, same, device)
    check_tied(folder, model)
    place_buffers(model, device)
    rows = {one: stored.rows(one, span(stored.shape(one)[0])).to(device, dtype, copy=True) for one in divided}
    check_weights(model, rows)
    if device.type == "cpu":
        widen_products(dtype)
    return model, rows


def network_tensors(folder: Path, model: PreTrainedModel) -> StoredTensors:
    """Open a folder's tensors by the names that they have in a network, where transformers knows them by others."""
    changes, wanted = get_model_conversion_mapping(model), model.state_dict()
    renamings = [one for one in changes if isinstance(one, WeightRenaming)]

    def renamed(name: str) -> str:
        found, _ = rename_source_key(name, renamings, [], model.base_model_prefix, wanted)
        return found if found in wanted or name not in wanted else name

    return StoredTensors(folder, renamed)


def frame(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model for evaluation whose parameters wait on meta; its buffers hold what the network computes itself.

    Raises ModelError for kinds that kdctl does not handle, and for networks with weights of two number formats.
    """
    empty = skeleton(config)
    kept = list(empty._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else []
    kept += list(empty._keep_in_fp32_modules or ()) if dtype == torch.float16 else []
    if kept:
        raise ModelError(
            f"model type {config.model_type!r} keeps {kept[0]} in float32 whatever it is loaded in, and FSDP2 "
            "divides weights of one number format; launch copies with --multi_gpu, or set teacher.dtype=float32"
        )
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a model a tensor in place of its own; a parameter that is given to two models is one object in both."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        module.register_parameter(leaf, own)


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move a model's buffers to a device, where its parameters wait on meta."""
    for name, buffer in list(model.named_buffers()):
        put(model, name, buffer.to(device))


def _read(model: PreTrainedModel, stored: StoredTensors, same: Mapping[str, Tensor], device: torch.device) -> None:
    """Read what is one tensor in the network; files may hold it under several names."""
    first, wanted = next(name for name in same if name in stored), next(iter(same.values()))

    def read(name: str) -> Tensor:
        found = stored[name].to(device, wanted.dtype, copy=True)
        return nn.Parameter(found, requires_grad=False) if isinstance(wanted, nn.Parameter) else found

    value = read(first)
    for name in same:
        own = value if name == first or name not in stored else read(name)
        put(model, name, value if torch.equal(own, value) else own)


def _tied(model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """Group the tensors that a network stores by the objects that they are."""
    groups: dict[int, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), {})[name] = tensor
    yield from groups.values()


def _differences(model: nn.Module, stored: StoredTensors) -> dict[str, Any]:
    """Say, as transformers does, what files lack or have too much, and which shapes differ."""
    wanted = {name: tuple(tensor.shape) for same in _tied(model) for name, tensor in same.items()}
    return {
        "missing_keys": [next(iter(same)) for same in _tied(model) if not stored.keys() & same.keys()],
        "unexpected_keys": stored.keys() - wanted.keys(),
        "mismatched_keys": [
            (name, stored.shape(name), shape)
            for name, shape in wanted.items()
            if name in stored and stored.shape(name) != shape
        ],
    }
