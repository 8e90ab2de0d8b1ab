"""Rounding with feedback along both axes of a weight. Pure functions on tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdctl.quant.affine import Grid, QParams, QuantizedWeight, dequantize
from kdctl.quant.gptq import by_column, inverse_factor

ROWS = 128
"""Rows that are rounded side by side, without feedback among them."""


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
    lie on its diagonal, (size, size) float32 each. Columns as in GPTQ. Rows of a block, the most sensitive first,
    ``rows`` at a time: their error D moves the targets of those that follow by −U₂ᵀ·U₁⁻ᵀ·D with UᵀU = F⁻¹. With one
    row at a time these are the optimal brain surgeon's steps on the Kronecker product F⊗H (Tseng et al. 2025, YAQA,
    section 3). Scales are chosen when a row's turn comes, for what ``lasting`` says of its columns. Damping is a
    share of each matrix's mean diagonal. Raises torch.linalg.LinAlgError if F or H stays singular.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    importance = lasting(order, factor)

    def round_rows(target: Tensor) -> QuantizedWeight:
        return by_column(target, importance, order, factor, grid, dtype)

    sizes = [len(block) for block in fisher]
    blocks = zip(weight.float().split(sizes), fisher, strict=True)
    return joined([_by_row(part, block, output_damping, rows, round_rows) for part, block in blocks])


def lasting(order: Tensor, factor: Tensor) -> Tensor:
    """Return what an error of each column costs once the columns after it have compensated it, (in_features,).

    With UᵀU = H⁻¹ the whole cost of GPTQ's errors e is Σ (e_c / U_cc)²; the diagonal of H counts what is won back too.
    """
    found = torch.empty_like(factor.diagonal())
    found[order] = factor.diagonal().pow(-2)
    return found


def _by_row(
    weight: Tensor, fisher: Tensor, damping: float, rows: int, round_rows: Callable[[Tensor], QuantizedWeight]
) -> QuantizedWeight:
    """Quantize the rows of one block, each error compensated in those that follow."""
    order = fisher.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(fisher[order][:, order], damping)
    targets, parts = weight[order], []
    for start in range(0, len(targets), rows):
        stop = min(start + rows, len(targets))
        found = round_rows(targets[start:stop])
        error = targets[start:stop] - dequantize(found.codes, found.qparams, found.grid).float()
        solved = torch.linalg.solve_triangular(factor[start:stop, start:stop].T, error, upper=False)
        targets[stop:].addmm_(factor[start:stop, stop:].T, solved, alpha=-1)
        parts.append(found)
    return joined(parts, order.argsort())


def joined(parts: Sequence[QuantizedWeight], order: Tensor | None = None) -> QuantizedWeight:
    """Put the rows of several weights below one another, then in an order."""
    columns = [(part.codes, part.qparams.scale, part.qparams.zero_point) for part in parts]
    codes, scale, zero = (torch.cat(column) for column in zip(*columns, strict=True))
    if order is not None:
        codes, scale, zero = codes[order], scale[order], zero[order]
    return QuantizedWeight(codes, QParams(scale, zero), parts[0].grid)
