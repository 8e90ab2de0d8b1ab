"""Second-order error compensation on the shipping grid. Pure functions on tensors."""

import torch
from torch import Tensor

from kdctl.quant.affine import Grid, QParams, QuantizedWeight, grouped
from kdctl.quant.scales import ZERO_SHIFTS, minmax, search

BLOCK = 128


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, dtype: torch.dtype, damping: float) -> QuantizedWeight:
    """Quantize a weight column by column, each column's error compensated in those that follow.

    weight: (out_features, in_features); hessian: (in_features, in_features) float32, Σ x·xᵀ over calibration tokens.
    Frantar et al. 2022 (GPTQ), algorithm 1, columns in order of decreasing activation. Scales and zero points are
    chosen before, group by group in the stored order and weighted by activation, so nothing is permuted on disk.
    Damping is a share of the mean diagonal. Raises torch.linalg.LinAlgError if the damped Hessian is singular.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    wide = weight.float()
    qparams = weighted_search(wide, hessian.diagonal(), grid, dtype)
    permuted = compensate(wide[:, order], factor, order // grid.group_size, qparams, grid)
    codes = torch.empty_like(permuted)
    codes[:, order] = permuted
    return QuantizedWeight(codes, qparams, grid)


def weighted_search(weight: Tensor, importance: Tensor, grid: Grid, dtype: torch.dtype) -> QParams:
    """Choose scales and zero points with the least squared error weighted by importance, from min-max on.

    weight: (R, C); importance of its columns, (C,), or of each of its numbers, (R, C).
    """
    weights = (importance / importance.mean(-1, keepdim=True).clamp(min=1e-30)).clamp(min=1e-3)
    start = minmax(weight, grid, torch.float32)
    shifts = (0,) if grid.symmetric else ZERO_SHIFTS
    return search(weight, start, grid, dtype, shifts, grouped(weights, grid.group_size))


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, (in_features, in_features) float32."""
    damped = hessian.double()
    damped.diagonal().add_(damping * hessian.diagonal().mean().clamp(min=1e-8))
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)  # H = R·Rᵀ, so H⁻¹ = UᵀU with U = R⁻¹
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True).float()


def compensate(weight: Tensor, factor: Tensor, groups: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Round columns left to right, spreading each rounding error over the columns to the right; returns codes uint8.

    groups: (in_features,) the group that each (permuted) column belongs to.
    """
    columns = weight.T.contiguous()  # a column is one run of memory: the loop reads little else
    scale, zero = (tensor.T[groups].float() for tensor in (qparams.scale, qparams.zero_point))
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for column in range(start, stop):
            code = torch.addcdiv(zero[column], columns[column], scale[column]).round_().clamp_(0, grid.max_code)
            value = ((code - zero[column]) * scale[column]).to(qparams.scale.dtype).float()
            error = torch.sub(columns[column], value, out=errors[column - start]).div_(factor[column, column])
            columns[column:stop].addr_(factor[column, column:stop], error, alpha=-1)
            codes[column] = code
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T
