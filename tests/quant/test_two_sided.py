"""Rounding with feedback along both axes."""

import pytest
import torch
from torch import Tensor

from kdctl.quant.affine import Grid, QParams, QuantizedWeight, dequantize
from kdctl.quant.gptq import compensate, gptq, inverse_factor, weighted_search
from kdctl.quant.two_sided import by_group, lasting, two_sided

GRIDS = [Grid(4, 32, False), Grid(3, 32, True), Grid(2, 64, False), Grid(8, 64, True)]
DAMPING, OUTPUT_DAMPING = 0.01, 0.1


def correlated(seed: int, size: int) -> Tensor:
    """Return Σ x·xᵀ of correlated vectors of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) * 0.3 + torch.eye(size)
    vectors = torch.randn(600, size, generator=generator) @ mixing * torch.logspace(-1, 1, size)
    return vectors.T @ vectors


def data(rows: int = 96, columns: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, the Hessian of its inputs and the Fisher information of its outputs."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)) * 0.05
    return weight, correlated(0, columns), correlated(1, rows)


def kl_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, fisher: Tensor) -> float:
    """Return tr(F·D·H·Dᵀ) of the error D."""
    error = (weight - dequantize(quantized.codes, quantized.qparams, quantized.grid).float()).double()
    return float(((fisher.double() @ error) * (error @ hessian.double())).sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_the_error_under_both_is_far_below_that_of_feedback_along_columns_alone(grid: Grid) -> None:
    weight, hessian, fisher = data()
    found = two_sided(weight, hessian, [fisher], grid, torch.bfloat16, DAMPING, OUTPUT_DAMPING, rows=16)
    assert int(found.codes.max()) <= grid.max_code
    alone = gptq(weight, hessian, grid, torch.bfloat16, DAMPING)
    assert kl_error(weight, found, hessian, fisher) < 0.8 * kl_error(weight, alone, hessian, fisher)


def test_outputs_of_equal_worth_leave_feedback_along_columns() -> None:
    """Group after group, columns as GPTQ has them, with a scale that costs no more than the searched one."""
    weight, hessian, _ = data()
    grid, order = GRIDS[0], by_group(hessian.diagonal(), 32)
    found = two_sided(weight, hessian, [torch.eye(96)], grid, torch.bfloat16, DAMPING, OUTPUT_DAMPING)
    factor, left, same = inverse_factor(hessian[order][:, order], DAMPING), weight[:, order].clone(), 0
    for start in range(0, 128, 32):
        part, group = slice(start, start + 32), int(order[start]) // 32
        searched = weighted_search(left[:, part], lasting(factor)[part], grid, torch.bfloat16)
        kept = QParams(found.qparams.scale[:, [group]], found.qparams.zero_point[:, [group]])
        spread = torch.linalg.inv(factor[part, part])

        def errors(qparams: QParams, part: slice = part, spread: Tensor = spread) -> tuple[Tensor, Tensor]:
            only = torch.zeros(32, dtype=torch.long)
            codes = compensate(left[:, part], factor[part, part], only, qparams, grid)
            return codes, (left[:, part] - dequantize(codes, qparams, grid).float()) @ spread

        codes, error = errors(kept)
        assert torch.equal(found.codes[:, order[part]], codes)
        assert bool((error.square().sum(1) <= errors(searched)[1].square().sum(1) * (1 + 1e-5)).all())
        assert torch.equal(kept.zero_point, searched.zero_point)
        same += int((kept.scale == searched.scale).sum())
        left[:, start + 32 :] -= error @ factor[part, start + 32 :]
    assert 0 < same < 96 * 4  # some are kept as they were searched, some are fitted


def test_groups_go_by_their_activity_and_columns_by_theirs_within() -> None:
    assert by_group(torch.tensor([1.0, 2, 9, 0, 5, 5]), 2).tolist() == [4, 5, 2, 3, 1, 0]


def test_an_error_costs_what_compensation_leaves_of_it() -> None:
    """Against the cost of a column's unit error with the best changes of all columns after it, in float64."""
    _, hessian, _ = data()
    damped = hessian.double() + DAMPING * hessian.diagonal().double().mean() * torch.eye(128)
    found = lasting(inverse_factor(hessian, DAMPING))
    for column in (0, 40, 127):
        after = torch.arange(column + 1, 128)
        cross = damped[column, after]
        cost = damped[column, column] - cross @ torch.linalg.solve(damped[after][:, after], cross)
        assert float(found[column]) == pytest.approx(float(cost), rel=1e-3)


def test_blocks_of_outputs_know_nothing_of_one_another() -> None:
    weight, hessian, fisher = data()
    halves = [fisher[:48, :48], fisher[48:, 48:]]

    def rounded(weight: Tensor, blocks: list[Tensor]) -> Tensor:
        return two_sided(weight, hessian, blocks, GRIDS[0], torch.bfloat16, DAMPING, OUTPUT_DAMPING, rows=16).codes

    apart = [rounded(weight[:48], halves[:1]), rounded(weight[48:], halves[1:])]
    assert torch.equal(rounded(weight, halves), torch.cat(apart))


def surgeon(weight: Tensor, hessian: Tensor, fisher: Tensor, quantized: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Go over F⊗H as the optimal brain surgeon, in float64, one weight after the other, the inverse whole.

    Returns the codes, and what each weight was when it was rounded, in cells from the middle of its own.
    """

    def damped(matrix: Tensor, share: float) -> Tensor:
        return matrix.double() + share * matrix.diagonal().double().mean() * torch.eye(len(matrix))

    qparams, grid = quantized.qparams, quantized.grid
    rows = fisher.diagonal().argsort(descending=True, stable=True)
    columns = by_group(hessian.diagonal(), grid.group_size)
    outer, inner = damped(fisher, OUTPUT_DAMPING)[rows][:, rows], damped(hessian, DAMPING)[columns][:, columns]
    inverse = torch.linalg.inv(torch.kron(outer, inner))
    left = weight.double()[rows][:, columns].flatten()
    codes, distances = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    for place in range(len(left)):
        row, column = rows[place // len(columns)], columns[place % len(columns)]
        scale, zero = (each[row, column // grid.group_size].double() for each in (qparams.scale, qparams.zero_point))
        code = (left[place] / scale + zero).round().clamp(0, grid.max_code)
        before = left[place].clone()
        stored = ((code - zero) * scale).to(qparams.scale.dtype).double()
        left = left - (left[place] - stored) / inverse[place, place] * inverse[place]
        inverse = inverse - torch.outer(inverse[:, place], inverse[place]) / inverse[place, place]
        codes[row, column] = code.to(torch.uint8)
        distances[row, column] = before / scale + zero - code
    return codes, distances


def test_one_row_at_a_time_is_the_optimal_brain_surgeon_on_the_kronecker_product() -> None:
    grid = Grid(4, 8, False)
    weight, hessian, fisher = data(rows=12, columns=32)
    found = two_sided(weight, hessian, [fisher], grid, torch.bfloat16, DAMPING, OUTPUT_DAMPING, rows=1)
    codes, distances = surgeon(weight, hessian, fisher, found)
    assert float((found.codes == codes).float().mean()) > 0.99
    assert found.offsets is not None
    off = found.offsets.float() / 256 - distances.clamp(-127 / 256, 127 / 256)
    assert float((off[found.codes == codes].abs() < 0.01).float().mean()) > 0.98


def test_outputs_that_do_not_count_and_dead_inputs_are_rounded_too() -> None:
    weight, hessian, fisher = data()
    hessian[5], hessian[:, 5], fisher[7], fisher[:, 7] = 0, 0, 0, 0
    found = two_sided(weight, hessian, [fisher], GRIDS[0], torch.bfloat16, DAMPING, OUTPUT_DAMPING)
    value = dequantize(found.codes, found.qparams, found.grid).float()
    assert bool(value.isfinite().all())
    assert bool((found.qparams.scale > 0).all())
