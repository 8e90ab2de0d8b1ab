"""The one arithmetic: exact where the design says exact, and the same as compressed-tensors'."""

import itertools
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import dequantize as reference_dequantize
from torch import Tensor

from kdctl.formats.student import packed_tensors, unpacked
from kdctl.quant.affine import (
    Grid,
    QParams,
    QuantizedWeight,
    dequantize,
    grouped,
    inside,
    into_cell,
    offsets_of,
    quantize,
    round_scale,
)

BITS = (2, 3, 4, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXACT_GRIDS = [(bits, symmetric) for bits in (2, 3, 4) for symmetric in (False, True)] + [(8, True)]
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(bits: int, rows: int, columns: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=generator(), dtype=torch.uint8)


def random_weight(grid: Grid, dtype: torch.dtype, rows: int = 24, groups: int = 5) -> QuantizedWeight:
    """Make codes, scales and zero points that have nothing to do with any weight."""
    scale = (torch.rand(rows, groups, generator=generator(1)) * 0.1 + 1e-3).to(dtype)
    zero = torch.randint(0, grid.max_code + 1, scale.shape, generator=generator(2), dtype=torch.uint8)
    if grid.symmetric:
        zero.fill_(grid.middle)
    return QuantizedWeight(random_codes(grid.bits, rows, groups * grid.group_size), QParams(scale, zero), grid)


def whole_grid(bits: int, symmetric: bool, dtype: torch.dtype) -> QuantizedWeight:
    """List every code against every zero point and every mantissa of a scale; rows of one group each."""
    grid = Grid(bits, 2**bits, symmetric)
    mantissas = 2 ** MANTISSA_BITS[dtype]
    scales = (1 + torch.arange(mantissas, dtype=torch.float64) / mantissas).to(dtype) * 2.0**-6
    zeros = torch.tensor([grid.middle]) if symmetric else torch.arange(2**bits)
    pairs = torch.cartesian_prod(torch.arange(mantissas), zeros)
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(len(pairs), 1)
    return QuantizedWeight(codes, QParams(scales[pairs[:, :1]], pairs[:, 1:].to(torch.uint8)), grid)


def test_codes_and_zero_points_are_stored_as_compressed_tensors_reads_them():
    for bits, symmetric, rows in itertools.product(BITS, (False, True), (2, 13, 48)):
        grid = Grid(bits, 11, symmetric)
        weight = random_weight(grid, torch.float32, rows)
        stored = packed_tensors("a", weight)
        again = unpacked("a", stored, grid)
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.qparams.zero_point, weight.qparams.zero_point)
        if rows == 2 and bits == 4:
            continue  # compressed-tensors cannot view a single word of zero points as bytes
        args = QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy=QuantizationStrategy.GROUP, group_size=grid.group_size
        )
        local = {name.removeprefix("a."): tensor for name, tensor in stored.items()}
        found = PackedQuantizationCompressor.decompress(local, QuantizationScheme(targets=["Linear"], weights=args))
        assert torch.equal(found["weight"], dequantize(weight.codes, weight.qparams, grid)), (bits, symmetric, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_equals_compressed_tensors(bits: int, symmetric: bool, dtype: torch.dtype):
    weight = random_weight(Grid(bits, 8, symmetric), dtype)
    middle = 2 ** (bits - 1)
    expected = reference_dequantize(
        (weight.codes.int() - middle).to(torch.int8),
        weight.qparams.scale,
        None if symmetric else (weight.qparams.zero_point.int() - middle).to(torch.int8),
        QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=QuantizationStrategy.GROUP, group_size=8),
    )
    found = dequantize(weight.codes, weight.qparams, weight.grid)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_rounds_only_the_product_and_only_once(bits: int, dtype: torch.dtype):
    weight = random_weight(Grid(bits, 8, False), dtype)
    difference = grouped(weight.codes.double(), 8) - weight.qparams.zero_point.double().unsqueeze(-1)
    exact = (difference * weight.qparams.scale.double().unsqueeze(-1)).flatten(-2)
    assert torch.equal(dequantize(weight.codes, weight.qparams, weight.grid), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "symmetric"), EXACT_GRIDS)
def test_every_point_of_the_grid_requantizes_to_its_code(bits: int, symmetric: bool, dtype: torch.dtype):
    weight = whole_grid(bits, symmetric, dtype)
    dense = dequantize(weight.codes, weight.qparams, weight.grid)
    codes = quantize(dense, weight.qparams, weight.grid)
    assert torch.equal(codes, weight.codes)
    assert torch.equal(dequantize(codes, weight.qparams, weight.grid), dense)


def test_asymmetric_8_bit_with_bf16_scales_does_not_come_back():
    weight = whole_grid(8, False, torch.bfloat16)
    codes = quantize(dequantize(weight.codes, weight.qparams, weight.grid), weight.qparams, weight.grid)
    wrong = codes != weight.codes
    distance = (weight.codes.int() - weight.qparams.zero_point.int()).abs()
    assert wrong.any()
    assert not wrong[distance <= 128].any()


def test_rounding_is_half_to_even():
    grid = Grid(4, 8, False)
    weight = torch.tensor([[0.5, 1.5, 2.5, 3.5, 4.5, 13.5, 14.5, 15.5]])
    qparams = QParams(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    assert quantize(weight, qparams, grid).tolist() == [[0, 2, 2, 4, 4, 14, 14, 15]]
    shifted = QParams(torch.ones(1, 1), torch.full((1, 1), 3, dtype=torch.uint8))
    assert quantize(weight - 3, shifted, grid).tolist() == [[0, 2, 2, 4, 4, 14, 14, 15]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_scales_are_positive_and_finite(dtype: torch.dtype):
    scale = round_scale(torch.tensor([0.0, 1e-45, 1e-30, 1.0, 1e30, 3e38, torch.inf]), dtype)
    assert scale.dtype == dtype
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert scale[3] == 1


@pytest.mark.parametrize("bits", BITS)
def test_inside_is_false_exactly_where_the_code_is_clamped(bits: int):
    grid = Grid(bits, 8, False)
    weight = random_weight(grid, torch.float32)
    values = torch.randn(weight.codes.shape, generator=generator(3)) * 0.06 * 2**bits
    free = grouped(values, 8) / weight.qparams.scale.unsqueeze(-1) + weight.qparams.zero_point.unsqueeze(-1)
    clamped = free.round().flatten(-2) != quantize(values, weight.qparams, grid)
    assert 0.02 < clamped.float().mean() < 0.98
    assert torch.equal(inside(values, weight.qparams, grid), ~clamped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_into_cell_gives_any_weight_any_codes(bits: int, symmetric: bool, dtype: torch.dtype):
    weight = random_weight(Grid(bits, 8, symmetric), dtype)
    values = torch.randn(weight.codes.shape, generator=generator(3)).to(dtype)
    moved = into_cell(values, weight)
    assert moved.dtype == torch.float32
    assert torch.equal(quantize(moved, weight.qparams, weight.grid), weight.codes)


@pytest.mark.parametrize("bits", BITS)
def test_into_cell_moves_no_weight_that_rounds_to_its_code_and_others_to_the_middle(bits: int):
    weight = random_weight(Grid(bits, 8, False), torch.bfloat16)
    values = (torch.randn(weight.codes.shape, generator=generator(3)) * 0.06 * 2**bits).bfloat16()
    own = quantize(values, weight.qparams, weight.grid)
    agrees = QuantizedWeight(own, weight.qparams, weight.grid)
    assert torch.equal(into_cell(values, agrees), values.float())

    same = own == weight.codes
    moved = into_cell(values, weight)
    assert same.any()
    assert torch.equal(moved[same], values.float()[same])
    scale = weight.qparams.scale.double().repeat_interleave(8, 1)
    zero = weight.qparams.zero_point.double().repeat_interleave(8, 1)
    middle = (weight.codes - zero) * scale
    torch.testing.assert_close(moved.double()[~same], middle[~same], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_offsets_bring_back_where_a_weight_was_in_its_cell(bits: int):
    weight = random_weight(Grid(bits, 8, False), torch.bfloat16)
    scale = weight.qparams.scale.float().repeat_interleave(8, 1)
    zero = weight.qparams.zero_point.float().repeat_interleave(8, 1)
    away = torch.rand(weight.codes.shape, generator=generator(4)) * 1.4 - 0.7  # some outside their cells
    values = (weight.codes.float() - zero + away) * scale
    found = replace(weight, offsets=offsets_of(values, scale, zero, weight.codes))
    moved = into_cell(torch.zeros_like(values), found)
    assert torch.equal(quantize(moved, weight.qparams, weight.grid), weight.codes)
    expected = (weight.codes.float() - zero + away.clamp(-0.5, 0.5)) * scale
    assert bool(((moved - expected).abs() <= scale * (1 / 256 + 1e-5)).all())
