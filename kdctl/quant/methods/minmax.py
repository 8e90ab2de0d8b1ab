"""Min-max: the codes span each group's range."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdctl.config.section import Section
from kdctl.quant.quantizer import QuantizeContext, Quantizer

if TYPE_CHECKING:
    from kdctl.quant.affine import Weights


class MinMax(Quantizer):
    """Reads weights only."""

    name = "minmax"
    needs = frozenset()
    settings = Section
    packages = ()

    def quantize(self, context: QuantizeContext) -> Weights:
        """Put each weight on the grid by itself."""
        from kdctl.quant.apply import quantize_each
        from kdctl.quant.scales import minmax

        return quantize_each(context, minmax)


QUANTIZER = MinMax()
