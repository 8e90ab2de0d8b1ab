"""HQQ: half-quadratic zero points, then a search for scales that integer zero points go with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdctl.config.section import Section
from kdctl.quant.quantizer import QuantizeContext, Quantizer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kdctl.config.preset import QuantizeSection
    from kdctl.quant.affine import Weights


class Hqq(Quantizer):
    """Reads weights only."""

    name = "hqq"
    needs = frozenset()
    settings = Section
    packages = ("hqq",)

    def rounding(self, settings: QuantizeSection, layers: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
        """Return the bytes and operators of the solver and the search."""
        return 6100.0 * sum(rows * columns for rows, columns in layers.values()), 1100.0 * len(layers)

    def quantize(self, context: QuantizeContext) -> Weights:
        """Put each weight on the grid by itself."""
        from kdctl.quant.apply import quantize_each
        from kdctl.quant.scales import hqq

        return quantize_each(context, hqq)


QUANTIZER = Hqq()
