"""GPTQ: each column's rounding error compensated in the columns after it, decoder layer by decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdctl.config.section import Positive, Section
from kdctl.quant.quantizer import QuantizeContext, Quantizer, Statistic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from kdctl.config.preset import QuantizeSection
    from kdctl.quant.affine import QuantizedWeight, Weights


class GptqSettings(Section):
    """Settings of GPTQ."""

    damping: Positive = 0.02
    """Share of the mean diagonal added to the Hessian by ``gptq`` and ``kl``."""


class Gptq(Quantizer):
    """Each layer sees the quantized ones before it."""

    name = "gptq"
    needs = frozenset({Statistic.INPUT_HESSIAN})
    settings = GptqSettings
    packages = ()

    def rounding(self, settings: QuantizeSection, layers: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
        """Return the bytes and operators of the search and of the loop over columns."""
        started = sum(630.0 + 11 * columns for _, columns in layers.values())
        return 3200.0 * sum(rows * columns for rows, columns in layers.values()), started

    def quantize(self, context: QuantizeContext) -> Weights:
        """Quantize the teacher's layers in order, on calibration sequences."""
        from kdctl.quant.calibrate import quantize_in_order
        from kdctl.quant.gptq import gptq

        own = context.settings.of(GptqSettings)

        def compensated(_names: tuple[str, ...], weight: Tensor, hessian: Tensor) -> QuantizedWeight:
            return gptq(weight, hessian, context.grid, weight.dtype, own.damping)

        with context.task() as advance:
            return quantize_in_order(context.teacher, context.layers, context.batches, compensated, advance)


QUANTIZER = Gptq()
