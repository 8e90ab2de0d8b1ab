"""Elementwise arithmetic in one kernel: on a GPU each operator starts by itself, and reads and writes every number."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def fused(work: Callable[P, T], place: Tensor) -> Callable[P, T]:
    """Return a function as it is fastest where a tensor lies: compiled on a GPU that has Triton, else as it is.

    What adds, subtracts, multiplies, divides and rounds gives the same bits in both ways.
    """
    return compiled(work) if place.device.type == "cuda" and find_spec("triton") else work


@cache
def compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as torch compiles it, once for all sizes."""
    exact: dict[str, Any] = {"eager_numerics.division_rounding": True}  # Triton's own division is approximate
    return torch.compile(work, fullgraph=True, dynamic=True, options=exact)
