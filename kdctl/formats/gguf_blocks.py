"""Weights on the grid as GGUF blocks: 32 codes along in_features, a half-precision scale, and for Q4_1 an offset.

The grid's value is (q − z) · s. Q4_0, Q5_0 and Q8_0 hold codes and d: the code is q − z (plus 8 or 16), d is s, and
nothing is lost where s is a half-precision number. Q4_1 holds codes, d and m: the code is q, d is s, m is −z · s, which
half precision has to round where the product needs more than 11 significant bits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize as read_blocks
from torch import Tensor

from kdctl.quant.affine import Grid, QuantizedWeight, dequantize, grouped

BLOCK = 32
CODE_OFFSETS = {Kind.Q4_0: 8, Kind.Q5_0: 16, Kind.Q8_0: 0}


@dataclass(frozen=True)
class Blocks:
    """One weight in GGUF blocks.

    data: (out_features, bytes a row) uint8. exact: blocks whose scale and offset are the grid's to the bit.
    largest_difference: between what is read back from ``data`` and Q(W), which is rounded to the model's dtype.
    rounded_difference: the same where what is read back is rounded to that dtype too; 0 if all blocks are exact.
    """

    kind: Kind
    data: np.ndarray
    blocks: int
    exact: int
    largest_difference: float
    rounded_difference: float


def block_kind(grid: Grid, exact: bool) -> Kind:
    """Choose the smallest GGUF type for a grid; ``exact`` prefers one that never rounds an offset."""
    if grid.bits == 8:
        return Kind.Q8_0
    if grid.bits < 4 or grid.symmetric:
        return Kind.Q4_0
    return Kind.Q5_0 if exact else Kind.Q4_1


def to_blocks(weight: QuantizedWeight, kind: Kind) -> Blocks:
    """Lay a weight out in GGUF blocks."""
    codes, scale, zero = _by_block(weight)
    numbers = [scale] if kind in CODE_OFFSETS else [scale, -zero * scale]
    halves = [number.half() for number in numbers]
    if kind in CODE_OFFSETS:
        codes = codes - zero.short() + CODE_OFFSETS[kind]
    parts = [_bytes(half) for half in halves] + _packed(codes, kind)
    data = torch.cat(parts, dim=-1).flatten(1).numpy()
    kept = [(half.double() == number).squeeze(-1) for half, number in zip(halves, numbers, strict=True)]
    stored, read = dequantize(weight.codes, weight.qparams, weight.grid), torch.from_numpy(read_blocks(data, kind))
    rounded = read.to(stored.dtype).float()
    differences = [float((each - stored.float()).abs().max()) for each in (read, rounded)]
    return Blocks(kind, data, kept[0].numel(), int(torch.stack(kept).all(0).sum()), *differences)


def _by_block(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (rows, blocks, 32) int16, scale and zero point (rows, blocks, 1) float64: the products are exact."""
    repeats = weight.grid.group_size // BLOCK
    scale, zero = (
        each.double().repeat_interleave(repeats, dim=-1).unsqueeze(-1)
        for each in (weight.qparams.scale, weight.qparams.zero_point)
    )
    return grouped(weight.codes, BLOCK).short(), scale, zero


def _packed(codes: Tensor, kind: Kind) -> list[Tensor]:
    """Lay out codes: bytes for Q8_0; else low halves beside high halves of a block, fifth bits before them."""
    if kind == Kind.Q8_0:
        return [_bytes(codes.to(torch.int8))]
    octets = codes.to(torch.uint8)
    nibbles = octets & 15
    halves = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
    if kind != Kind.Q5_0:
        return [halves]
    places = 1 << torch.arange(8, dtype=torch.uint8)
    fifth = ((octets >> 4).unflatten(-1, (4, 8)) * places).sum(-1, dtype=torch.uint8)
    return [fifth, halves]


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
