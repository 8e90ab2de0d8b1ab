"""How scales and zero points are chosen: always usable, min-max tight, HQQ never worse than min-max."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_qparams
from hqq.core.quantize import Quantizer
from torch import Tensor

from kdctl.quant.affine import Grid, QParams, dequantize, grouped, quantize
from kdctl.quant.scales import ZERO_SHIFTS, hqq, minmax, quantize_weight, search

GROUP = 16
GRIDS = [Grid(bits, GROUP, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)]
METHODS = {"hqq": hqq, "minmax": minmax}
NAMES = sorted(METHODS)


def named(grid: Grid) -> str:
    return f"{grid.bits}bit-{'sym' if grid.symmetric else 'asym'}"


def normal(rows: int = 32, columns: int = 4 * GROUP, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, Tensor]:
    """Return well-behaved and nasty weights, float32."""
    return {
        "normal": normal() * 0.02,
        "heavy tails": normal() * 0.02 / normal(seed=1).abs().clamp(min=0.05),
        "one sign": normal().abs() + 1,
        "constant": torch.full((4, 4 * GROUP), -0.37),
        "small": normal() * 1e-4,
        "tiny": normal() * 1e-7,
        "zero": torch.zeros(4, 4 * GROUP),
        "large": normal() * 1e3,
    }


def error(weight: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Return Σ(W − (q − z)·s)² of each group in float64, without the last rounding of the product."""
    codes = quantize(weight, qparams, grid)
    exact = QParams(qparams.scale.double(), qparams.zero_point)
    return grouped(weight.double() - dequantize(codes, exact, grid), grid.group_size).square().sum(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize("method", NAMES)
def test_scales_are_positive_and_finite_whatever_the_group(method: str, grid: Grid, dtype: torch.dtype):
    for name, weight in weights().items():
        quantized = quantize_weight(weight.to(dtype), METHODS[method], grid, dtype)
        scale, zero = quantized.qparams.scale, quantized.qparams.zero_point
        assert scale.dtype == dtype, name
        assert scale.shape == zero.shape == (len(weight), 4), name
        assert torch.isfinite(scale).all(), name
        assert (scale > 0).all(), name
        assert zero.dtype == torch.uint8, name
        assert zero.max() <= grid.max_code, name
        assert torch.isfinite(dequantize(quantized.codes, quantized.qparams, grid)).all(), name


@pytest.mark.parametrize("size", [1e-39, 1e-30, 1e20, 1e37])
@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize("method", NAMES)
def test_scales_are_positive_and_finite_at_the_ends_of_bf16(method: str, grid: Grid, size: float):
    quantized = quantize_weight((normal(4) * size).bfloat16(), METHODS[method], grid, torch.bfloat16)
    assert torch.isfinite(quantized.qparams.scale).all()
    assert (quantized.qparams.scale > 0).all()


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.symmetric], ids=named)
@pytest.mark.parametrize("method", NAMES)
def test_symmetric_zero_points_stay_in_the_middle(method: str, grid: Grid):
    for weight in weights().values():
        assert (METHODS[method](weight, grid, torch.bfloat16).zero_point == grid.middle).all()


@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize("method", NAMES)
def test_zero_stays_zero(method: str, grid: Grid):
    weight = normal()
    weight[:, ::3] = 0
    quantized = quantize_weight(weight, METHODS[method], grid, torch.bfloat16)
    assert (dequantize(quantized.codes, quantized.qparams, grid)[:, ::3] == 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_minmax_is_nowhere_off_by_more_than_half_a_step(grid: Grid):
    for name, weight in weights().items():
        qparams = minmax(weight, grid, torch.float32)
        noise = grouped(weight - dequantize(quantize(weight, qparams, grid), qparams, grid), GROUP).abs()
        assert (noise <= 0.5001 * qparams.scale.unsqueeze(-1)).all(), name


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_minmax_is_that_of_compressed_tensors(grid: Grid):
    arguments = QuantizationArgs(
        num_bits=grid.bits, symmetric=grid.symmetric, strategy=QuantizationStrategy.GROUP, group_size=GROUP
    )
    for name in ("normal", "heavy tails", "one sign", "large"):
        weight = weights()[name]
        groups = grouped(weight, GROUP)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        found = minmax(weight, grid, torch.float32)
        torch.testing.assert_close(found.scale, scale, rtol=1e-6, atol=0)
        assert torch.equal(found.zero_point.int(), zero.int() + grid.middle), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_minmax_finds_the_grid_of_weights_that_span_it(bits: int):
    grid = Grid(bits, GROUP, False)
    codes = torch.randint(0, 2**bits, (8, 4 * GROUP), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes[:, ::GROUP], codes[:, 1::GROUP] = 0, grid.max_code
    scale = torch.tensor([1.0, 1.25, 1.5, 0.0625]).repeat(8, 1)
    zero = torch.arange(8).repeat(4, 1).t().remainder(2**bits).to(torch.uint8)
    weight = dequantize(codes, QParams(scale, zero), grid)
    found = quantize_weight(weight, minmax, grid, torch.bfloat16)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.qparams.scale.float(), scale)
    assert torch.equal(found.qparams.zero_point, zero)


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_hqq_leaves_no_group_with_more_squared_error_than_minmax(grid: Grid):
    for name, weight in weights().items():
        found = error(weight, hqq(weight, grid, torch.bfloat16), grid)
        plain = error(weight, minmax(weight, grid, torch.bfloat16), grid)
        assert (found <= plain * 1.0001 + 1e-12 * weight.square().sum()).all(), name


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_hqq_is_better_than_minmax_on_ordinary_weights(grid: Grid):
    weight = weights()["normal"]
    found = error(weight, hqq(weight, grid, torch.bfloat16), grid)
    assert found.sum() < 0.97 * error(weight, minmax(weight, grid, torch.bfloat16), grid).sum()


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_search_is_never_worse_than_its_start(grid: Grid):
    weight = weights()["normal"]
    scale = (torch.rand(32, 4, generator=torch.Generator().manual_seed(1)) * 0.05 + 1e-3).bfloat16()
    zero = torch.randint(0, grid.max_code + 1, scale.shape, generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    start = QParams(scale, zero)
    found = error(weight, search(weight, start, grid, torch.bfloat16, ZERO_SHIFTS), grid)
    before = error(weight, start, grid)
    assert (found <= before * 1.0001).all()
    assert found.sum() < 0.9 * before.sum()


def test_asymmetric_hqq_asks_the_hqq_library_along_in_features(monkeypatch: pytest.MonkeyPatch):
    calls, original = [], Quantizer.quantize

    def spy(weight: Tensor, **options):
        calls.append((weight, options))
        return original(weight, **options)

    monkeypatch.setattr(Quantizer, "quantize", spy)
    weight = normal()
    hqq(weight, Grid(3, GROUP, True), torch.bfloat16)
    assert not calls
    hqq(weight, Grid(3, GROUP, False), torch.bfloat16)
    ((given, options),) = calls
    assert torch.equal(given, weight)
    assert (options["nbits"], options["group_size"], options["axis"]) == (3, GROUP, 1)


def test_asymmetric_hqq_searches_around_the_scale_of_the_hqq_library(monkeypatch: pytest.MonkeyPatch):
    grid = Grid(4, GROUP, False)
    codes = torch.arange(4 * GROUP).remainder(7).add(3).repeat(8, 1).to(torch.uint8)
    truth = QParams(torch.full((8, 4), 0.25), torch.full((8, 4), 5, dtype=torch.uint8))
    weight = dequantize(codes, truth, grid)

    def answer(*_, **__):
        return None, {"scale": truth.scale.view(-1, 1), "zero": truth.zero_point.float().view(-1, 1) + 0.3}

    monkeypatch.setattr(Quantizer, "quantize", answer)
    found = hqq(weight, grid, torch.bfloat16)
    assert torch.equal(found.scale.float(), truth.scale)
    assert torch.equal(dequantize(quantize(weight, found, grid), found, grid), weight)
