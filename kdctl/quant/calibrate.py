"""Layer-by-layer quantization with calibration data.

The inputs of each decoder layer come from the already quantized ones before it, so that every layer compensates what
went wrong earlier. One layer's Hessians are in memory at a time.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdctl.base.errors import ModelError
from kdctl.base.progress import Advance, ignore
from kdctl.model.attention import Layout, forward
from kdctl.model.batch import Batch
from kdctl.quant.affine import QuantizedWeight, Weights, dequantize

FromHessian = Callable[[str, Tensor, Tensor], QuantizedWeight]
"""Maps a layer's name, weight and Hessian to a quantized weight."""
LAYER = re.compile(r"^(.*?\.\d+)\.")


def by_decoder_layer(names: Sequence[str]) -> dict[str, list[str]]:
    """Group linear layers by the decoder layer that holds them. Raises ModelError if one is outside of all."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = LAYER.match(name)
        if match is None:
            raise ModelError(
                f"{name} is in no decoder layer, so it has no place in layer-by-layer calibration; skip it"
            )
        groups.setdefault(match.group(1), []).append(name)
    return groups


@torch.no_grad()
def quantize_in_order(
    model: PreTrainedModel,
    names: Sequence[str],
    batches: Sequence[Batch],
    quantizer: FromHessian,
    progress: Advance = ignore,
    token_weights: Mapping[str, Sequence[Tensor]] | None = None,
) -> Weights:
    """Quantize a model's layers in place, first to last, and return their weights on the grid.

    token_weights: what each token of each batch, (N,), counts in the Hessian of a layer; without them all count one.
    """
    groups = by_decoder_layer(names)
    hidden, options = first_inputs(model, list(groups), batches)
    weights: Weights = {}
    for done, (prefix, members) in enumerate(groups.items()):
        layer = model.get_submodule(prefix)
        modules = {name: model.get_submodule(name) for name in members}
        own = {name: token_weights[name] for name in members} if token_weights else {}
        hessians = collect(layer, modules, hidden, options[prefix], own)
        for name in members:
            parameter = model.get_parameter(f"{name}.weight")
            weights[name] = quantizer(name, parameter, hessians[name])
            parameter.copy_(dequantize(weights[name].codes, weights[name].qparams, weights[name].grid))
        hidden = [run(layer, state, kept) for state, kept in zip(hidden, options[prefix], strict=True)]
        progress(done + 1, len(groups))
    return weights


def run(layer: nn.Module, hidden: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Run one decoder layer on its own."""
    output = layer(hidden, **options)
    return output[0] if isinstance(output, tuple) else output


def first_inputs(
    model: PreTrainedModel, prefixes: Sequence[str], batches: Sequence[Batch]
) -> tuple[list[Tensor], dict[str, list[dict[str, Any]]]]:
    """Catch the first decoder layer's input and every decoder layer's other arguments (masks, positions), per batch."""
    hidden: list[Tensor] = []
    options: dict[str, list[dict[str, Any]]] = {prefix: [] for prefix in prefixes}

    def catch(prefix: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if prefix == prefixes[0]:
                hidden.append(arguments[0])
            options[prefix].append(named)

        return hook

    hooks = [
        model.get_submodule(prefix).register_forward_pre_hook(catch(prefix), with_kwargs=True) for prefix in prefixes
    ]
    try:
        for batch in batches:
            forward(model, batch.input_ids, batch.position_ids, Layout(batch.seq_lens))
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, options


def collect(
    layer: nn.Module,
    members: Mapping[str, nn.Module],
    hidden: Sequence[Tensor],
    options: Sequence[Mapping[str, Any]],
    token_weights: Mapping[str, Sequence[Tensor]],
) -> dict[str, Tensor]:
    """Sum x·xᵀ over the tokens that reach each linear layer, each times its weight in that layer if it has one.

    Layers with one input share one sum where nothing is weighted.
    """
    sums: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    seen: dict[int, tuple[str, Tensor]] = {}  # holds the inputs too, so that none is freed and its id used again
    turns = {name: iter(weights) for name, weights in token_weights.items()}

    def gather(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            owners[name] = name if turns else seen.setdefault(id(arguments[0]), (name, arguments[0]))[0]
            if owners[name] == name:
                tokens = arguments[0].flatten(0, -2).float()
                product = tokens.T @ (tokens * next(turns[name]).unsqueeze(-1) if turns else tokens)
                sums[name] = sums[name].add_(product) if name in sums else product

        return hook

    hooks = [module.register_forward_pre_hook(gather(name)) for name, module in members.items()]
    try:
        for state, kept in zip(hidden, options, strict=True):
            seen.clear()
            run(layer, state, kept)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sums[owners[name]] for name in members}
