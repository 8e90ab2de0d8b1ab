"""Counts what a device would be asked to do: operators, reads that the host waits for, and copies to the device."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero", "unique_consecutive"}
"""Operators whose result the host needs before it can go on: numbers, or shapes that depend on numbers."""


class Tally(TorchDispatchMode):
    """Counts operators by name. made: tensors that were made of the host's numbers, each a copy to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def operators(self) -> int:
        """Operators that ran."""
        return self.seen.total()

    @property
    def reads(self) -> int:
        """Waits of the host for the device."""
        return sum(count for name, count in self.seen.items() if name in READS)

    @property
    def made(self) -> int:
        """Tensors made of numbers of the host."""
        return self.seen["lift_fresh"]


def masked_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest: int,
    longest_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Compute what ``torch.nn.attention.varlen.varlen_attn`` is documented to, by one mask over all tokens.

    The last query of a sequence stands at its last key.
    """
    assert enable_gqa
    assert window_size[1] == 0
    assert query_ends.dtype == key_ends.dtype == torch.int32
    places = [torch.arange(len(tensor)) for tensor in (query, key)]
    owner, keys = (
        torch.searchsorted(ends, place, right=True) - 1
        for ends, place in zip((query_ends, key_ends), places, strict=True)
    )
    distance = (places[0] - query_ends[owner + 1]).unsqueeze(-1) - (places[1] - key_ends[keys + 1])
    seen = (owner.unsqueeze(-1) == keys) & (distance >= 0)
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    rows = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
    return scaled_dot_product_attention(*rows, attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)
