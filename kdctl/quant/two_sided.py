"""Rounding with feedback along both axes of a weight. Pure functions on tensors.

A tile is ``ROWS`` rows of one group of columns, which share a scale. It needs the errors of the tiles above it, in its
own columns, and of those to its left, in its own rows: tiles on one diagonal need nothing of each other and are rounded
side by side.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdctl.quant.affine import Grid, QParams, QuantizedWeight, offsets_of, round_scale
from kdctl.quant.gptq import inverse_factor, weighted_search

ROWS = 16
"""Rows of a tile, without feedback among them."""


def two_sided(
    weight: Tensor,
    hessian: Tensor,
    fisher: Sequence[Tensor],
    grid: Grid,
    dtype: torch.dtype,
    damping: float,
    output_damping: float,
    rows: int = ROWS,
) -> QuantizedWeight:
    """Quantize a weight so that tr(F·D·H·Dᵀ) of its error D is small, H over its inputs and F over its outputs.

    weight: (out_features, in_features); hessian: (in_features, in_features) float32; fisher: the blocks of F that
    lie on its diagonal, (size, size) float32 each. Columns as in GPTQ, the most active group first and in it the most
    active column. Rows of a block, the most sensitive first, ``rows`` at a time: their error D moves the targets of
    those that follow by −U₂ᵀ·U₁⁻ᵀ·D with UᵀU = F⁻¹. With one row at a time these are the optimal brain surgeon's steps
    on the Kronecker product F⊗H (Tseng et al. 2025, YAQA, section 3). A group's scale is chosen when its turn comes,
    for what ``lasting`` says of its columns. Damping is a share of each matrix's mean diagonal. Raises
    torch.linalg.LinAlgError if F or H stays singular.
    """
    order = by_group(hessian.diagonal(), grid.group_size)
    groups, columns = (order[:: grid.group_size] // grid.group_size).argsort(), order.argsort()
    inner = inverse_factor(hessian[order][:, order], damping)
    firsts = [block.diagonal().argsort(descending=True, stable=True) for block in fisher]
    outer = [inverse_factor(block[at][:, at], output_damping) for block, at in zip(fisher, firsts, strict=True)]
    parts = zip(weight.split([len(block) for block in fisher]), firsts, strict=True)
    ordered = torch.cat([part[first] for part, first in parts])[:, order].float()
    found = in_tiles(ordered, inner, outer, grid, dtype, rows)
    back = torch.cat([start + first.argsort() for start, first in zip(_starts(firsts), firsts, strict=True)])
    places = (columns, columns, groups, groups)
    codes, offsets, scale, zero = (each[back][:, at] for each, at in zip(found, places, strict=True))
    return QuantizedWeight(codes, QParams(scale, zero), grid, offsets)


def by_group(activity: Tensor, group_size: int) -> Tensor:
    """Order columns by falling activity, (in_features,), groups as a whole first and then the columns of each."""
    groups = activity.view(-1, group_size)
    within = groups.argsort(dim=1, descending=True, stable=True)
    within += torch.arange(0, len(activity), group_size, device=activity.device).unsqueeze(-1)
    return within[groups.sum(1).argsort(descending=True, stable=True)].flatten()


def lasting(factor: Tensor) -> Tensor:
    """Return what an error of each column costs once the columns after it have compensated it, (in_features,).

    With UᵀU = H⁻¹ the whole cost of GPTQ's errors e is Σ (e_c / U_cc)²; the diagonal of H counts what is won back too.
    """
    return factor.diagonal().pow(-2)


def in_tiles(
    weight: Tensor, inner: Tensor, outer: Sequence[Tensor], grid: Grid, dtype: torch.dtype, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize a weight whose rows and columns are in the order of rounding, (R, C) float32.

    inner: upper factor of the inverse of H, (C, C); outer: those of F's blocks, of R rows together. Blocks are rounded
    side by side. Returns codes and offsets (R, C), scales and zero points (R, groups).
    """
    columns = grid.group_size
    weight, outer, real = _in_equal_tiles(weight, outer, rows)
    targets = _cut(weight, columns, rows)
    solvers = torch.cat([_blocks(block, rows) for block in outer]).transpose(1, 2)
    solvers = torch.linalg.solve_triangular(solvers, torch.eye(rows, device=weight.device), upper=False)
    triangles, importance = _blocks(inner, columns), lasting(inner).view(-1, columns)
    compensation, codes = torch.zeros_like(targets), torch.empty_like(targets, dtype=torch.uint8)
    offsets = torch.empty_like(targets, dtype=torch.int8)
    across, _, down, _ = targets.shape
    scale = torch.empty(across, down, rows, dtype=dtype, device=weight.device)
    zero, after = torch.empty_like(scale, dtype=torch.uint8), _after(outer, rows)
    for tiles in _diagonals(across, [len(block) // rows for block in outer]):
        column, row = torch.tensor(tiles, device=weight.device).unbind(1)
        at = (column, slice(None), row)
        found = _round(targets[at] + compensation[at], importance[column], triangles[column], grid, dtype)
        codes[at], offsets[at] = found.codes, found.offsets
        scale[column, row], zero[column, row] = found.scale[:, 0], found.zero[:, 0]
        solved = (solvers[row] @ (targets[at] - found.values).transpose(1, 2)).transpose(1, 2)
        for (c, r), moved, errors in zip(tiles, solved, found.errors, strict=True):
            below, factor = after[r]
            targets[c].flatten(1)[:, below].addmm_(moved, factor, alpha=-1)
            right = (c + 1) * columns
            spread = inner[right - columns : right, right:].T @ errors
            compensation[c + 1 :, :, r] -= spread.unflatten(0, (across - c - 1, columns))
    whole = [each.flatten(2).flatten(0, 1).T[real] for each in (codes, offsets)]
    return whole[0], whole[1], scale.flatten(1).T[real], zero.flatten(1).T[real]


def _in_equal_tiles(weight: Tensor, outer: Sequence[Tensor], rows: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Add to blocks rows of zeros that nothing depends on, so that tiles are equal; say where the others now are."""
    heights = [len(block) for block in outer]
    more = [-height % rows for height in heights]
    parts = zip(weight.split(heights), more, strict=True)
    padded = torch.cat([pad(part, (0, 0, 0, count)) for part, count in parts])
    longer = [torch.block_diag(b, torch.eye(n, device=b.device)) for b, n in zip(outer, more, strict=True)]
    real = [start + torch.arange(height) for start, height in zip(_starts(longer), heights, strict=True)]
    return padded, longer, torch.cat(real).to(weight.device)


def _starts(parts: Sequence[Tensor]) -> list[int]:
    """Say where each part of a whole starts."""
    return list(accumulate((len(part) for part in parts[:-1]), initial=0))


def _diagonals(across: int, heights: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """List tiles by column and row that wait for none of each other, blocks of so many rows of tiles side by side."""
    starts = list(accumulate(heights, initial=0))
    for diagonal in range(across + max(heights) - 1):
        yield [
            (column, start + diagonal - column)
            for start, height in zip(starts, heights, strict=False)
            for column in range(max(0, diagonal - height + 1), min(across, diagonal + 1))
        ]


def _after(outer: Sequence[Tensor], rows: int) -> list[tuple[slice, Tensor]]:
    """Say, for each row of tiles, which rows of its block come after it, and their part of the factor."""
    return [
        (slice(start + below, start + len(block)), block[below - rows : below, below:])
        for start, block in zip(_starts(outer), outer, strict=True)
        for below in range(rows, len(block) + 1, rows)
    ]


class Rounded(NamedTuple):
    """Tiles (T, columns, rows) as they were rounded; scales and zero points (T, 1, rows)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    values: Tensor
    errors: Tensor
    """Over the factor's diagonal: the sum of their squares is what a tile's rounding costs."""
    offsets: Tensor


def _round(tiles: Tensor, importance: Tensor, triangles: Tensor, grid: Grid, dtype: torch.dtype) -> Rounded:
    """Round tiles side by side; then once more with scales fitted to the codes, and keep what costs a row less.

    importance: (T, columns); triangles: the factor's block of each tile, (T, columns, columns).
    """
    rows = tiles.shape[2]
    groups = tiles.transpose(1, 2).flatten(0, 1)
    chosen = weighted_search(groups, importance.repeat_interleave(rows, 0), grid, dtype)
    scale, zero = (each.view(-1, 1, rows) for each in (chosen.scale, chosen.zero_point))
    first = _by_column(tiles, scale, zero, triangles, grid)
    second = _by_column(tiles, _fitted(tiles, first, triangles), zero, triangles, grid)
    better = second.errors.square().sum(1, keepdim=True) < first.errors.square().sum(1, keepdim=True)
    return Rounded(*(torch.where(better, new, old) for new, old in zip(second, first, strict=True)))


def _by_column(tiles: Tensor, scale: Tensor, zero: Tensor, triangles: Tensor, grid: Grid) -> Rounded:
    """Round column by column, each error compensated in the tile's columns that follow."""
    # a column of all tiles is one run of memory
    left = tiles.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    steps, values, errors = (torch.empty_like(left) for _ in range(3))
    wide, shift = scale.squeeze(1).float(), zero.squeeze(1).float()
    low, high = -shift, grid.max_code - shift
    factors = triangles.permute(1, 2, 0).unsqueeze(-1)
    columns = zip(left.unbind(), steps.unbind(), values.unbind(), errors.unbind(), factors.unbind(), strict=True)
    for at, (column, step, value, error, factor) in enumerate(columns):
        torch.div(column, wide, out=step).round_().clamp_(low, high)
        value.copy_((step * wide).to(scale.dtype))
        torch.sub(column, value, out=error).div_(factor[at])
        left[at + 1 :].addcmul_(factor[at + 1 :], error, value=-1)
    codes, wanted, values, errors = (each.transpose(0, 1) for each in (steps + shift, left, values, errors))
    return Rounded(codes.to(torch.uint8), scale, zero, values, errors, offsets_of(wanted, scale, zero, codes))


def _fitted(tiles: Tensor, found: Rounded, triangles: Tensor) -> Tensor:
    """Return the scales with which the codes cost least: least squares on U⁻ᵀ·W over U⁻ᵀ·(q − z)."""
    steps = found.codes.float() - found.zero
    both = torch.linalg.solve_triangular(triangles.transpose(1, 2), torch.cat([steps, tiles], 2), upper=False)
    unit, whole = both.split(tiles.shape[2], 2)
    scale = (unit * whole).sum(1, keepdim=True) / unit.square().sum(1, keepdim=True).clamp(min=1e-30)
    return round_scale(torch.where(scale > 0, scale, found.scale.float()), found.scale.dtype)


def _cut(matrix: Tensor, columns: int, rows: int) -> Tensor:
    """View (R, C) as (column tiles, columns, row tiles, rows)."""
    return matrix.T.contiguous().unflatten(1, (-1, rows)).unflatten(0, (-1, columns))


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the blocks on the diagonal, (n, size, size)."""
    places = torch.arange(len(matrix) // size, device=matrix.device)
    return matrix.unflatten(1, (-1, size)).unflatten(0, (-1, size))[places, :, places]
