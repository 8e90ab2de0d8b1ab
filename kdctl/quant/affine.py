"""The one arithmetic: integer codes, scales and zero points, and how they are packed. Pure functions on tensors.

For a weight W (out_features, in_features) and groups of ``group_size`` along in_features::

    q    = clamp(round_half_even(W / s + z), 0, 2^bits - 1)      in float32
    Q(W) = (q - z) * s                                           difference exact, product rounded once to s's dtype

This is what compressed-tensors computes for the ``pack-quantized`` format, which stores q and z less 2^(bits-1). What
trains, generates, is evaluated and is saved goes through these functions and no others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from torch import Tensor

from kdctl.config.preset import QuantizeSection

PARTS = 256
"""Places in a cell that an offset tells apart."""


@dataclass(frozen=True)
class Grid:
    """Shape of the integer grid: bits per weight, weights per scale, whether the zero point is fixed."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def max_code(self) -> int:
        """Largest code, 2^bits − 1."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The symmetric zero point, 2^(bits−1)."""
        return 2 ** (self.bits - 1)


@dataclass(frozen=True)
class QParams:
    """Quantization parameters of one weight.

    scale: (out_features, groups), the checkpoint dtype, positive. zero_point: (out_features, groups) uint8.
    """

    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on the grid: codes (out_features, in_features) uint8 and their parameters."""

    codes: Tensor
    qparams: QParams
    grid: Grid
    offsets: Tensor | None = None
    """What each weight was when it was rounded, errors of others compensated in it: its distance from the middle of its
    cell in 256ths of the scale, int8. None where the method does not say."""

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """Return some of the rows, in memory of their own."""
        part = slice(start, stop)
        qparams = QParams(self.qparams.scale[part].clone(), self.qparams.zero_point[part].clone())
        offsets = None if self.offsets is None else self.offsets[part].clone()
        return QuantizedWeight(self.codes[part].clone(), qparams, self.grid, offsets)


Weights = dict[str, QuantizedWeight]
"""Weights on the grid by the name of their linear layer."""


def grid_of(settings: QuantizeSection) -> Grid:
    """Return the grid that the settings ask for."""
    return Grid(settings.bits, settings.group_size, settings.symmetric)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """View (out_features, in_features) as (out_features, groups, group_size)."""
    return weight.unflatten(-1, (-1, group_size))


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the stored dtype, keeping them positive and finite."""
    limits = torch.finfo(dtype)
    return scale.clamp(limits.tiny, limits.max).to(dtype)


def grid_position(weight: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Return W / s + z before rounding and clamping, (out_features, groups, group_size) float32."""
    scale = qparams.scale.float().unsqueeze(-1)
    return (grouped(weight.float(), grid.group_size) / scale).add_(qparams.zero_point.unsqueeze(-1))


def quantize(weight: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Map a weight to its codes, (out_features, in_features) uint8."""
    position = grid_position(weight, qparams, grid)
    return position.round().clamp(0, grid.max_code).to(torch.uint8).flatten(-2)


def inside(weight: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Tell which weights are not clamped, (out_features, in_features) bool."""
    return unclamped(grid_position(weight, qparams, grid), grid).flatten(-2)


def unclamped(position: Tensor, grid: Grid) -> Tensor:
    """Tell which positions on the grid round to a code without clamping.

    Half-even rounding takes −0.5 to code 0 and 2^bits − 0.5 to 2^bits, so the interval is closed below and open above.
    """
    return (position >= -0.5) & (position < grid.max_code + 0.5)


def fake_quantize(weight: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Map a weight to Q(W), float32; rounded to the scale's dtype it is ``dequantize(quantize(weight))`` to the bit.

    A difference of codes times a scale of at most 16 significant bits is exact in float32, so one rounding is left.
    """
    position = grid_position(weight, qparams, grid).round_().clamp_(0, grid.max_code)
    return position.sub_(qparams.zero_point.unsqueeze(-1)).mul_(qparams.scale.float().unsqueeze(-1)).flatten(-2)


def dequantize(codes: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Map codes to Q(W), (out_features, in_features) in the dtype of the scale."""
    dtype = qparams.scale.dtype
    difference = grouped(codes, grid.group_size).to(dtype) - qparams.zero_point.unsqueeze(-1).to(dtype)
    return (difference * qparams.scale.unsqueeze(-1)).flatten(-2)


def write_quantized(place: Tensor, weight: Tensor, qparams: QParams, grid: Grid) -> None:
    """Write Q(W) of a weight where it is to be, in the scale's dtype."""
    place.copy_(fake_quantize(weight, qparams, grid))


def write_dequantized(place: Tensor, codes: Tensor, qparams: QParams, grid: Grid) -> None:
    """Write Q(W) of codes where it is to be, in the scale's dtype."""
    place.copy_(dequantize(codes, qparams, grid))


def pack(values: Tensor, bits: int, dim: Literal[0, 1] = 1) -> Tensor:
    """Pack (rows, columns) codes along one dimension into int32 words, as ``pack-quantized`` stores them.

    A value may straddle two words: ⌈n·bits/32⌉ of them hold n values. Zero points are packed along dimension 0.
    """
    return pack_to_int32((values.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), bits, dim)


def unpack(packed: Tensor, bits: int, shape: Sequence[int], dim: Literal[0, 1] = 1) -> Tensor:
    """Undo ``pack``: codes of that shape, uint8."""
    if dim == 0:
        return unpack(packed.t(), bits, shape[::-1]).t().contiguous()
    if 0 in shape:
        return packed.new_empty(shape, dtype=torch.uint8)
    # contiguous() would keep the strides of a transposed single word, which compressed-tensors cannot view as bytes
    words = packed.clone(memory_format=torch.contiguous_format)
    values = unpack_from_int32(words, bits, torch.Size(shape))
    return (values.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).contiguous()


def offsets_of(weight: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
    """Return where weights lie in the cells of their codes, int8; what lies outside is put at the edge."""
    distance = (weight / scale.float()).add_(zero).sub_(codes)
    return distance.mul_(PARTS).round_().clamp_(1 - PARTS // 2, PARTS // 2 - 1).to(torch.int8)


def into_cell(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Move a weight into the rounding cells of given codes, float32 (out_features, in_features).

    Where the method left offsets, those decide. Else it is unchanged where it already rounds to its code, and elsewhere
    the middle of the cell, so that the first steps of training do not undo what a calibrated method decided.
    ``quantize(into_cell(W, Q), ...)`` is Q's codes, whatever chose them.
    """
    qparams, grid = quantized.qparams, quantized.grid
    zero = qparams.zero_point.float().unsqueeze(-1)
    difference = grouped(quantized.codes, grid.group_size).float() - zero
    if quantized.offsets is not None:
        difference += grouped(quantized.offsets, grid.group_size).float() / PARTS
        return (difference * qparams.scale.float().unsqueeze(-1)).flatten(-2)
    same = quantize(weight, qparams, grid) == quantized.codes
    middle = (difference * qparams.scale.float().unsqueeze(-1)).flatten(-2)
    return torch.where(same, weight.float(), middle)
