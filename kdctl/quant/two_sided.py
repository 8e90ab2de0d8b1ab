"""Rounding with feedback along both axes of a weight. Pure functions on tensors.

A tile is ``ROWS`` rows of one group of columns, which share a scale. It needs the errors of the tiles above it, in its
own columns, and of those to its left, in its own rows: tiles on one diagonal need nothing of each other and are rounded
side by side.
"""

from collections.abc import Sequence
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
    inner, parts = inverse_factor(hessian[order][:, order], damping), []
    for part, block in zip(weight.split([len(block) for block in fisher]), fisher, strict=True):
        first = block.diagonal().argsort(descending=True, stable=True)
        outer, back = inverse_factor(block[first][:, first], output_damping), first.argsort()
        found = in_tiles(part[first][:, order].float(), inner, outer, grid, dtype, min(rows, len(block)))
        parts.append([each[back][:, at] for each, at in zip(found, (columns, columns, groups, groups), strict=True)])
    codes, offsets, scale, zero = (torch.cat(each) for each in zip(*parts, strict=True))
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
    weight: Tensor, inner: Tensor, outer: Tensor, grid: Grid, dtype: torch.dtype, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize a weight whose rows and columns are in the order of rounding, (R, C) float32.

    inner, outer: upper factors of the inverses of H, (C, C), and F, (R, R). Returns codes and offsets (R, C), scales
    and zero points (R, groups).
    """
    height, columns = len(weight), grid.group_size
    more = -height % rows  # rows of zeros that nothing depends on, so that all tiles are equal
    targets = _cut(pad(weight, (0, 0, 0, more)), columns, rows)
    outer = torch.block_diag(outer, torch.eye(more, device=outer.device))
    solvers = _blocks(outer, rows).transpose(1, 2)
    solvers = torch.linalg.solve_triangular(solvers, torch.eye(rows, device=outer.device), upper=False)
    triangles, importance = _blocks(inner, columns), lasting(inner).view(-1, columns)
    across, down = targets.shape[0], targets.shape[2]
    compensation, codes = torch.zeros_like(targets), torch.empty_like(targets, dtype=torch.uint8)
    offsets = torch.empty_like(targets, dtype=torch.int8)
    scale = torch.empty(across, down, rows, dtype=dtype, device=weight.device)
    zero = torch.empty_like(scale, dtype=torch.uint8)
    for diagonal in range(across + down - 1):
        first, last = max(0, diagonal - down + 1), min(across, diagonal + 1)
        column = torch.arange(first, last, device=weight.device)
        row = diagonal - column
        at = (column, slice(None), row)
        found = _round(targets[at] + compensation[at], importance[column], triangles[column], grid, dtype)
        codes[at], offsets[at] = found.codes, found.offsets
        scale[column, row], zero[column, row] = found.scale[:, 0], found.zero[:, 0]
        solved = (solvers[row] @ (targets[at] - found.values).transpose(1, 2)).transpose(1, 2)
        for place, c in enumerate(range(first, last)):
            r = diagonal - c
            below, right = (r + 1) * rows, (c + 1) * columns
            targets[c].flatten(1)[:, below:].addmm_(solved[place], outer[below - rows : below, below:], alpha=-1)
            spread = inner[right - columns : right, right:].T @ found.errors[place]
            compensation[c + 1 :, :, r] -= spread.unflatten(0, (across - c - 1, columns))
    whole = [each.flatten(2).flatten(0, 1)[:, :height].T for each in (codes, offsets)]
    return whole[0], whole[1], scale.flatten(1).T[:height], zero.flatten(1).T[:height]


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
