"""Half-precision products on CPUs: where torch has no fast kernels, and where many of them use the same weights.

On x86 without AVX-512 a linear layer takes torch eight times as long in bfloat16 as in float32, and fifty times with
its gradients (benchmarks/products.py). Here operands are widened to float32, which is exact, and the result is rounded
once, as by torch's own kernels elsewhere.

Each such product reorders its weight first or, without instructions for it, widens it. Done once for a whole block of
completions (``packed``), that is the same sum without the copies: a fifth of a block's time at 4 rows, a tenth at 64,
on a CPU with bfloat16 products.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)
STATISTICS = {"aten::_scaled_dot_product_flash_attention_for_cpu": 1}
"""Results that stay float32: the logarithm of the sum, which the backward pass reads."""
BLOCK = 2**20
"""Numbers of a product's second factor that are float32 at once: an output head as a whole is a large copy."""


def slow_dtypes() -> frozenset[torch.dtype]:
    """List the half-precision formats that torch cannot multiply fast on this CPU."""
    able = torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return frozenset(d for d, can in zip((torch.bfloat16, torch.float16), able, strict=True) if not can)


Kernel = Callable[..., Any]


def widen_products(dtype: torch.dtype) -> None:
    """See to it that this process multiplies a format fast: where torch does not, replace its kernels, once.

    Where it does they stay as they are: a kernel in Python holds the interpreter's lock also for what it passes on.
    """
    if dtype in slow_dtypes():
        _widen_all()


@cache
def _widen_all() -> torch.library.Library | None:
    return register(slow_dtypes())


def register(dtypes: frozenset[torch.dtype]) -> torch.library.Library | None:
    """Put widening kernels in front of torch's own; they go when what is returned is destroyed."""
    if not dtypes:
        return None
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of each kernel that is replaced
        for name in PRODUCTS:
            kernel = torch.library.get_kernel(name, "CPU").call_boxed
            wide = _in_blocks(kernel) if name == "aten::mm" else _widened(kernel, STATISTICS.get(name))
            library.impl(name, _only(dtypes, wide, kernel), "CPU", with_keyset=True)
    return library


def _only(dtypes: frozenset[torch.dtype], wide: Kernel, kernel: Kernel) -> Kernel:
    def choose(keys: torch.DispatchKeySet, first: Tensor, *others: object, **options: object) -> Any:
        return (wide if first.dtype in dtypes else kernel)(keys, first, *others, **options)

    return choose


def _widened(kernel: Kernel, statistic: int | None) -> Kernel:
    def product(keys: torch.DispatchKeySet, first: Tensor, *others: object, **options: object) -> Any:
        dtype = first.dtype
        wide = {name: _wide(value) for name, value in options.items()}
        found = kernel(keys, first.float(), *map(_wide, others), **wide)
        if isinstance(found, Tensor):
            return found.to(dtype)
        return tuple(part if i == statistic else part.to(dtype) for i, part in enumerate(found))

    return product


def _in_blocks(kernel: Kernel) -> Kernel:
    """Multiply by one block of a large second factor after the other; sums over blocks stay float32 to their end."""

    def product(keys: torch.DispatchKeySet, first: Tensor, second: Tensor) -> Tensor:
        inner, columns = second.shape
        size = max(1, BLOCK // max(1, min(inner, columns)))
        if columns > inner:
            found, rows = first.new_empty(len(first), columns), first.float()
            for place, block in zip(found.split(size, 1), second.split(size, 1), strict=True):
                place.copy_(kernel(keys, rows, _wide(block)))
            return found
        blocks = zip(first.split(size, 1), second.split(size), strict=True)
        return reduce(Tensor.add_, (kernel(keys, rows.float(), _wide(block)) for rows, block in blocks)).to(first.dtype)

    return product


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype.is_floating_point else value


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
        return partial(_widened_linear, _reorder(weight.float()), None if layer.bias is None else layer.bias.float())
    return partial(_linear, _reorder(weight), layer.bias) if weight.dtype == torch.bfloat16 else None


def _widened_linear(weight: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
    return _linear(weight, bias, values.float()).to(values.dtype)


def _linear(weight: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)
