"""Layer-by-layer quantization with calibration data.

The inputs of each decoder layer come from the already quantized ones before it, so that every layer compensates what
went wrong earlier. One layer's Hessians are in memory at a time.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdctl.base.errors import ModelError
from kdctl.base.progress import Advance, ignore
from kdctl.model.attention import Layout, forward
from kdctl.model.batch import Batch
from kdctl.quant.affine import QuantizedWeight, Weights, dequantize

FromHessian = Callable[[tuple[str, ...], Tensor, Tensor], QuantizedWeight]
"""Maps the names of linear layers with one input, their weights on top of one another and the Hessian to one weight."""
STRIPS = 4
"""Strips that a symmetric product is made in."""
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
    """Quantize a model's layers, first to last, and return their weights on the grid.

    The model holds the quantized weights of one decoder layer at a time and ends as it began. token_weights: what each
    token of each batch, (N,), counts in the Hessian of a layer; without them all count one.
    """
    groups = by_decoder_layer(names)
    hidden, options = first_inputs(model, list(groups), batches)
    weights: Weights = {}
    for done, (prefix, members) in enumerate(groups.items()):
        layer = model.get_submodule(prefix)
        modules = {name: model.get_submodule(name) for name in members}
        own = {name: token_weights[name] for name in members} if token_weights else {}
        found: Weights = {}
        with _put_back(modules.values()):
            for sharing, hessian in collect(layer, modules, hidden, options[prefix], own).items():
                found |= _together({name: modules[name] for name in sharing}, hessian, quantizer)
            hidden = [run(layer, state, kept) for state, kept in zip(hidden, options[prefix], strict=True)]
        weights |= {name: found[name] for name in members}
        progress(done + 1, len(groups))
    return weights


@contextmanager
def _put_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give linear layers, after a block that puts others in their place, the very weights that they had."""
    parameters = [module.get_parameter("weight") for module in modules]
    before = [parameter.data for parameter in parameters]
    try:
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


def _together(modules: Mapping[str, nn.Module], hessian: Tensor, quantizer: FromHessian) -> Weights:
    """Quantize the weights of linear layers with one input as one weight, and have the layers hold it."""
    parameters = {name: module.get_parameter("weight") for name, module in modules.items()}
    whole, weights, start = quantizer(tuple(modules), torch.cat(list(parameters.values())), hessian), {}, 0
    for name, parameter in parameters.items():
        weights[name] = whole.rows(start, start + len(parameter))
        parameter.data = dequantize(weights[name].codes, weights[name].qparams, weights[name].grid).to(parameter.dtype)
        start += len(parameter)
    return weights


def run(layer: nn.Module, hidden: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Run one decoder layer on its own."""
    output = layer(hidden, **options)
    return output[0] if isinstance(output, tuple) else output


def first_inputs(
    model: PreTrainedModel, prefixes: Sequence[str], batches: Sequence[Batch]
) -> tuple[list[Tensor], dict[str, list[dict[str, Any]]]]:
    """Catch the first decoder layer's input and every decoder layer's other arguments (masks, positions), per batch.

    Decoder layers compute in the first batch only, which shows what they hand on; later they hand on what they get.
    """
    hidden: list[Tensor] = []
    options: dict[str, list[dict[str, Any]]] = {prefix: [] for prefix in prefixes}
    beside: dict[str, tuple[Any, ...] | None] = {}
    layers = {prefix: model.get_submodule(prefix) for prefix in prefixes}

    def catching(prefix: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def pass_on(state: Tensor, *others: Any, **named: Any) -> Any:
            if prefix == prefixes[0]:
                hidden.append(state)
            options[prefix].append(named)
            if prefix not in beside:
                output = compute(state, *others, **named)
                beside[prefix] = output[1:] if isinstance(output, tuple) else None
                return output
            kept = beside[prefix]
            return state if kept is None else (state, *kept)

        return pass_on

    try:
        for prefix, layer in layers.items():
            vars(layer)["forward"] = catching(prefix, layer.forward)
        for batch in batches:
            forward(model, batch.input_ids, batch.position_ids, Layout(batch.seq_lens))
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)
    return hidden, options


def collect(
    layer: nn.Module,
    members: Mapping[str, nn.Module],
    hidden: Sequence[Tensor],
    options: Sequence[Mapping[str, Any]],
    token_weights: Mapping[str, Sequence[Tensor]],
) -> dict[tuple[str, ...], Tensor]:
    """Sum x·xᵀ over the tokens that reach linear layers, by the names of those with one input.

    With weights, a token counts what its weights in the layers that share the input add up to.
    """
    sums: dict[tuple[str, ...], Tensor] = {}
    for done, (state, kept) in enumerate(zip(hidden, options, strict=True)):
        for names, tokens in inputs(layer, members, state, kept).items():
            counted = [token_weights[name][done] for name in names if token_weights]
            product = gram(tokens.float(), torch.stack(counted).sum(0) if counted else None)
            sums[names] = sums[names].add_(product) if names in sums else product
    return sums


def inputs(
    layer: nn.Module, members: Mapping[str, nn.Module], hidden: Tensor, options: Mapping[str, Any]
) -> dict[tuple[str, ...], Tensor]:
    """Run a decoder layer and return its linear layers' inputs, (N, in_features), by the names of those they reach."""
    reached: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        return lambda _, arguments: reached.update({name: arguments[0]})

    hooks = [module.register_forward_pre_hook(listen(name)) for name, module in members.items()]
    try:
        run(layer, hidden, options)
    finally:
        for hook in hooks:
            hook.remove()
    together: dict[int, list[str]] = {}
    for name, given in reached.items():
        together.setdefault(id(given), []).append(name)
    return {tuple(names): reached[names[0]].flatten(0, -2) for names in together.values()}


def gram(tokens: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Σ w·x·xᵀ over tokens x, (N, n), as (n, n) in their dtype; w is one without weights (N,).

    Each strip of rows is multiplied from the diagonal on and mirrored: 5/8 of the whole product.
    """
    left, size = tokens if weights is None else tokens * weights.unsqueeze(-1), tokens.shape[-1]
    product = tokens.new_empty(size, size)
    edges = [size * strip // STRIPS for strip in range(STRIPS + 1)]
    for start, stop in pairwise(edges):
        torch.mm(left[:, start:stop].T, tokens[:, start:], out=product[start:stop, start:])
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product
