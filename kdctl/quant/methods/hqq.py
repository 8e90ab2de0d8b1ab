"""HQQ: half-quadratic zero points, then a search for scales that integer zero points go with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdctl.config.section import Section
from kdctl.quant.quantizer import QuantizeContext, Quantizer

if TYPE_CHECKING:
    from kdctl.quant.affine import Weights


class Hqq(Quantizer):
    """Reads weights only."""

    name = "hqq"
    needs = frozenset()
    settings = Section
    packages = ("hqq",)

    def quantize(self, context: QuantizeContext) -> Weights:
        """Put each weight on the grid by itself."""
        from kdctl.quant.apply import quantize_each
        from kdctl.quant.scales import hqq

        return quantize_each(context, hqq)


QUANTIZER = Hqq()
