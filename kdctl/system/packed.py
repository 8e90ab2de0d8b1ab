"""Weights as the CPU's matrix product reads them, while many small products use the same ones.

Each half-precision product on a CPU reorders its weight first or, without instructions for it, widens it. Done once for
a whole block of completions, that is the same sum without the copies: a fifth of a block's time at 4 rows, a tenth at
64, on a CPU with bfloat16 products.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from kdctl.system.cpu_products import slow_dtypes


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Let a model's linear layers use copies of their weights in that form; until the end these must not change.

    Layers of other kinds, on other devices, in float32 or with weights that are no plain tensors stay as they are.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    try:
        for layer in layers:
            product = _product(layer)
            if product is not None:
                layer.forward = product  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def packed_bytes(weights: int, dtype: torch.dtype) -> int:
    """Return what so many weights of linear layers on a CPU take beside themselves."""
    if dtype in slow_dtypes():
        return weights * torch.float32.itemsize
    return weights * dtype.itemsize if dtype == torch.bfloat16 else 0


def _product(layer: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    weight = layer.weight.detach()
    if type(weight) is not Tensor or weight.device.type != "cpu":
        return None
    if weight.dtype in slow_dtypes():
        return partial(_wide, _reorder(weight.float()), None if layer.bias is None else layer.bias.float())
    return partial(_linear, _reorder(weight), layer.bias) if weight.dtype == torch.bfloat16 else None


def _wide(weight: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
    return _linear(weight, bias, values.float()).to(values.dtype)


def _linear(weight: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)
