"""Causal attention within each of several sequences that lie end to end.

One call of torch's variable-length kernel where there is one for the tensors, else a call a sequence. Queries, keys and
values are (1, heads, N, D), keys and values with as many heads or fewer. A prefix, (1, key heads, P, D) each, is seen
by all sequences before their own tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from kdctl.system.transfers import upload

Prefix = tuple[Tensor, Tensor]
AMPERE = (8, 0)
LARGEST_HEAD = 256
"""What FlashAttention-2 (Dao 2023) is written for: compute capability, and numbers of a head, a multiple of 8."""


@dataclass(frozen=True)
class Ends:
    """Where sequences lie, and where what each of them sees lies, on the device.

    queries, keys: (sequences + 1,) int32, the bounds of each. seen: which of prefix and tokens, in this order, the keys
    are, one sequence after the other; None without a prefix.
    """

    queries: Tensor
    keys: Tensor
    longest: int
    longest_keys: int
    seen: Tensor | None

    @classmethod
    def of(cls, lengths: Sequence[int], prefix: int, device: torch.device) -> "Ends":
        """Work them out on the host."""
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        queries = keys = upload(bounds, device)
        seen = None
        if prefix:
            keys = upload(bounds + prefix * torch.arange(len(bounds), dtype=torch.int32), device)
            own = torch.arange(prefix, prefix + int(bounds[-1])).split(list(lengths))
            seen = upload(torch.cat([part for one in own for part in (torch.arange(prefix), one)]), device)
        longest = max(lengths)
        return cls(queries, keys, longest, longest + prefix, seen)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether the variable-length kernel takes these tensors."""
    size = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == key.shape[-1] == value.shape[-1] <= LARGEST_HEAD
        and size % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= AMPERE
    )


def in_one_call(
    query: Tensor, key: Tensor, value: Tensor, prefix: Prefix | None, ends: Ends, window: int | None, scale: float
) -> Tensor:
    """Attend within all sequences at once. Returns (1, heads, N, D)."""
    if prefix is not None:
        key, value = (
            torch.cat([first, own], 2)[:, :, ends.seen] for first, own in zip(prefix, (key, value), strict=True)
        )
    out = varlen.varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        ends.queries,
        ends.keys,
        ends.longest,
        ends.longest_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    return out.transpose(0, 1).unsqueeze(0)  # pyright: ignore[reportAttributeAccessIssue]


def one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix | None,
    lengths: Sequence[int],
    window: int | None,
    scale: float,
) -> Tensor:
    """Attend within one sequence after the other. Returns (1, heads, N, D)."""
    parts = []
    for queries, keys, values in zip(*(tensor.split(list(lengths), 2) for tensor in (query, key, value)), strict=True):
        if prefix is not None:
            keys, values = torch.cat([prefix[0], keys], 2), torch.cat([prefix[1], values], 2)
        parts.append(_whole(queries, keys, values, window, scale))
    return torch.cat(parts, 2)


def _whole(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """Attend causally from a sequence's last tokens, (1, heads, T, D), to all of it, no further than the window."""
    length, whole = query.shape[2], key.shape[2]
    if length == whole and (window is None or length <= window):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    place = torch.arange(whole, device=query.device)
    distance = place[whole - length :].unsqueeze(-1) - place
    seen = (distance >= 0) & (distance < (window or whole))
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=True)
