"""What is compiled for a GPU gives the bits of what is not; seen with torch's compiler for CPUs."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import metrics

from kdctl.distill.shadow import code_slope, pass_through, scaled_inside
from kdctl.quant.affine import Grid, QuantizedWeight, write_dequantized, write_quantized
from kdctl.quant.scales import minmax, quantize_weight
from kdctl.system.fused import compiled, fused

GRID = Grid(4, 32, False)


def layer(rows: int, columns: int) -> tuple[Tensor, QuantizedWeight]:
    """Return weights, many of them on the edges between two codes and outside of the grid, and what they round to."""
    generator = torch.Generator().manual_seed(rows)
    found = quantize_weight(torch.randn(rows, columns, generator=generator).bfloat16(), minmax, GRID, torch.bfloat16)
    scale = found.qparams.scale.float().repeat_interleave(GRID.group_size, -1)
    zero = found.qparams.zero_point.repeat_interleave(GRID.group_size, -1)
    halves = torch.randint(-4, 36, (rows, columns), generator=generator) / 2
    return (halves - zero) * scale, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["write", "codes", "weights", "scales", "lora", "groups"])
def test_what_is_fused_gives_the_same_bits_in_one_kernel(name: str) -> None:
    metrics.reset()
    for rows, columns in ((8, 64), (24, 96)):  # the second without compiling again
        weight, found = layer(rows, columns)
        gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
        work, arguments = {
            "write": (write_quantized, (gradient, weight, found.qparams, GRID)),
            "codes": (write_dequantized, (gradient, found.codes, found.qparams, GRID)),
            "weights": (pass_through, (gradient, weight, found.qparams, GRID, False)),
            "scales": (pass_through, (gradient, weight, found.qparams, GRID, True)),
            "lora": (scaled_inside, (gradient, weight, found.qparams, GRID, 0.25)),
            "groups": (code_slope, (gradient, found.codes, found.qparams.zero_point, GRID)),
        }[name]
        expected = outcome(work, gradient, arguments)
        with ThreadPoolExecutor(1) as backward:  # a GPU's gradients come in another thread
            found_too = backward.submit(outcome, compiled(work), gradient, arguments).result()
        assert torch.equal(found_too[0], expected[0])
        if expected[1] is not None:
            torch.testing.assert_close(found_too[1], expected[1], rtol=1e-5, atol=1e-5)  # sums in another order
    assert metrics.generated_kernel_count == 1 + (name == "scales")


def outcome(work: Callable[..., Any], written: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """Run a function on a copy of what it writes on; return the copy and what it returns."""
    copy = written.clone()
    returned = work(*(copy if one is written else one for one in arguments))
    return copy, returned


def test_a_cpu_runs_what_was_given() -> None:
    assert fused(write_quantized, torch.zeros(1)) is write_quantized
