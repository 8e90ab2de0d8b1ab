"""GPTQ on the shipping grid."""

import pytest
import torch
from torch import Tensor

from kdctl.quant.affine import Grid, QuantizedWeight, dequantize, quantize
from kdctl.quant.gptq import gptq, inverse_factor
from kdctl.quant.scales import hqq, minmax, quantize_weight

GRIDS = [Grid(4, 32, False), Grid(4, 32, True), Grid(3, 32, False), Grid(2, 64, False), Grid(8, 64, True)]


def data(seed: int = 0, rows: int = 40, columns: int = 128) -> tuple[Tensor, Tensor]:
    """Return a weight and the Hessian of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    inputs = torch.randn(600, columns, generator=generator) @ mixing * torch.logspace(-1, 1, columns)
    return torch.randn(rows, columns, generator=generator) * 0.05, inputs.T @ inputs


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """Return ‖(W − Q)·X‖² over the calibration inputs X, from their Hessian."""
    error = (weight - dequantize(quantized.codes, quantized.qparams, quantized.grid).float()).double()
    return float((error @ hessian.double() * error).sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_output_error_is_far_below_that_of_rounding(grid: Grid) -> None:
    weight, hessian = data()
    found = output_error(weight, gptq(weight, hessian, grid, torch.bfloat16, 0.01), hessian)
    for method in (minmax, hqq):
        assert found < 0.6 * output_error(weight, quantize_weight(weight, method, grid, torch.bfloat16), hessian)


def test_uncorrelated_inputs_leave_plain_rounding() -> None:
    weight, _ = data()
    found = gptq(weight, torch.eye(128), GRIDS[0], torch.bfloat16, 0.01)
    assert torch.equal(found.codes, quantize(weight, found.qparams, GRIDS[0]))


def test_codes_are_codes_and_scales_are_positive_with_dead_inputs() -> None:
    weight, hessian = data()
    hessian[5], hessian[:, 5] = 0, 0
    found = gptq(weight, hessian, GRIDS[0], torch.bfloat16, 0.01)
    assert int(found.codes.max()) <= 15
    assert bool((found.qparams.scale > 0).all())
    assert output_error(weight, found, hessian) < output_error(
        weight, quantize_weight(weight, minmax, GRIDS[0], torch.bfloat16), hessian
    )


def test_factor_is_the_upper_cholesky_of_the_damped_inverse() -> None:
    _, hessian = data()
    factor = inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(128, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(128, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def surgeon(weight: Tensor, hessian: Tensor, quantized: QuantizedWeight, damping: float) -> Tensor:
    """Return the optimal brain surgeon's codes in float64: no blocks, no factor, each column leaves the inverse."""
    qparams, grid = quantized.qparams, quantized.grid
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    left, inverse = weight.double()[:, order], torch.linalg.inv(damped[order][:, order])
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for place, column in enumerate(order):
        scale, zero = (each[:, column // grid.group_size].double() for each in (qparams.scale, qparams.zero_point))
        code = (left[:, place] / scale + zero).round().clamp(0, grid.max_code)
        stored = ((code - zero) * scale).to(qparams.scale.dtype).double()
        left = left - torch.outer((left[:, place] - stored) / inverse[place, place], inverse[place])
        inverse = inverse - torch.outer(inverse[:, place], inverse[place]) / inverse[place, place]
        codes[:, column] = code.to(torch.uint8)
    return codes


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[4]])
def test_codes_are_those_of_the_optimal_brain_surgeon_in_float64_beyond_one_block(grid: Grid) -> None:
    weight, hessian = data(columns=192)
    found = gptq(weight, hessian, grid, torch.bfloat16, 0.01)
    same = found.codes == surgeon(weight, hessian, found, 0.01)
    assert float(same.float().mean()) > 0.999  # a value half-way between two codes may fall to either
