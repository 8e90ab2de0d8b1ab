"""Choosing scales and zero points for a weight: min-max, HQQ, search. Pure functions on tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdctl.quant.affine import Grid, QParams, QuantizedWeight, grouped, quantize, round_scale

SCALE_FACTORS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2)
ZERO_SHIFTS = (-1, 0, 1)


def minmax(weight: Tensor, grid: Grid, dtype: torch.dtype) -> QParams:
    """Span each group's range with the codes; symmetric grids span its largest magnitude."""
    groups = grouped(weight.float(), grid.group_size)
    if grid.symmetric:
        scale = groups.abs().amax(-1) / (grid.max_code / 2)
        return QParams(round_scale(scale, dtype), torch.full_like(scale, grid.middle, dtype=torch.uint8))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = round_scale((high - low) / grid.max_code, dtype)
    return QParams(scale, nearest_zero(-low / scale.float(), grid))


def hqq(weight: Tensor, grid: Grid, dtype: torch.dtype) -> QParams:
    """Take scale and float zero point from HQQ's solver, then repair what rounding the zero point costs.

    The solver minimises |W − Q(W)|^0.7 (Badri & Shaji, Half-Quadratic Quantization, 2023) over a *float* zero
    point. The shipping grid has integer ones, so scale × {0.8 .. 1.2} and zero ± 1 are searched per group. The search
    minimises the squared error: with the solver's own norm it clips large weights, which on a grid with integer zero
    points nearly doubles the KL to the teacher. HQQ moves the zero point only; a symmetric grid has none to move, and
    there the search alone decides. Min-max stays where it has less error: the solver bounds its scales from below and
    ends with a zero point outside the codes where all of a group has one sign.
    """
    if grid.symmetric:
        start = minmax(weight, grid, torch.float32)
        return search(weight, start, grid, dtype, shifts=(0,))
    from hqq.core.quantize import Quantizer  # takes seconds to import

    _, meta = Quantizer.quantize(
        weight.float(),
        nbits=grid.bits,
        group_size=grid.group_size,
        axis=1,
        bitpack=False,
        compute_dtype=torch.float32,
        device=str(weight.device),
    )
    shape = (weight.shape[0], -1)
    start = QParams(meta["scale"].float().view(shape), nearest_zero(meta["zero"].float().view(shape), grid))
    return best_of(weight, search(weight, start, grid, dtype, ZERO_SHIFTS), minmax(weight, grid, dtype), grid)


def best_of(weight: Tensor, first: QParams, second: QParams, grid: Grid) -> QParams:
    """Take, for each group, the parameters with the less squared error."""
    groups = grouped(weight.float(), grid.group_size)
    keep = squared_error(groups, first, grid) <= squared_error(groups, second, grid)
    scale = torch.where(keep, first.scale, second.scale)
    return QParams(scale, torch.where(keep, first.zero_point, second.zero_point))


def search(
    weight: Tensor,
    start: QParams,
    grid: Grid,
    dtype: torch.dtype,
    shifts: tuple[int, ...],
    importance: Tensor | None = None,
) -> QParams:
    """Pick, for each group, the scale and zero point near ``start`` with the least squared error.

    importance: (groups, group_size) weights of the squared errors, all one without it.
    """
    groups = grouped(weight.float(), grid.group_size)
    best = torch.full(start.scale.shape, torch.inf, device=weight.device)
    scale, zero = round_scale(start.scale, dtype), start.zero_point.clone()
    for shift in shifts:
        shifted = nearest_zero(start.zero_point.float() + shift, grid)
        for factor in SCALE_FACTORS:
            trial = QParams(round_scale(start.scale * factor, dtype), shifted)
            error = squared_error(groups, trial, grid, importance)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, trial.scale, scale)
            zero = torch.where(better, shifted, zero)
    return _fitted(groups, QParams(scale, zero), best, grid, importance)


def _fitted(groups: Tensor, qparams: QParams, error: Tensor, grid: Grid, importance: Tensor | None) -> QParams:
    """Take, for each group, the scale that fits its codes, Σ(q − z)·W / Σ(q − z)², where the error is less with it."""
    steps = _steps(groups, qparams, grid)
    weighed = steps if importance is None else steps * importance
    fitting = (weighed * groups).sum(-1) / (weighed * steps).sum(-1).clamp(min=1e-30)
    trial = QParams(round_scale(fitting, qparams.scale.dtype), qparams.zero_point)
    found = squared_error(groups, trial, grid, importance)
    better = (found < error) & (fitting > 0)
    return QParams(torch.where(better, trial.scale, qparams.scale), qparams.zero_point)


def squared_error(groups: Tensor, qparams: QParams, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """Return Σ(W − Q(W))², weighted if asked, of each group, (out_features, groups) float32."""
    errors = _steps(groups, qparams, grid).mul_(qparams.scale.float().unsqueeze(-1)).sub_(groups).square_()
    return errors.sum(-1) if importance is None else errors.mul_(importance).sum(-1)


def _steps(groups: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Round groups to codes less their zero points, float32."""
    zero = qparams.zero_point.float().unsqueeze(-1)
    return (groups / qparams.scale.float().unsqueeze(-1)).add_(zero).round_().clamp_(0, grid.max_code).sub_(zero)


def nearest_zero(zero: Tensor, grid: Grid) -> Tensor:
    """Round zero points to codes, uint8."""
    return zero.round().clamp(0, grid.max_code).to(torch.uint8)


QParamsOf = Callable[[Tensor, Grid, torch.dtype], QParams]
"""Chooses the scales and zero points of a weight (out_features, in_features); scales get the dtype."""


def quantize_weight(weight: Tensor, qparams_of: QParamsOf, grid: Grid, dtype: torch.dtype) -> QuantizedWeight:
    """Round one weight (out_features, in_features) to the nearest codes with chosen scales and zero points."""
    qparams = qparams_of(weight, grid, dtype)
    return QuantizedWeight(quantize(weight, qparams, grid), qparams, grid)
