"""KL-aware rounding: each error weighed by how the model's own distribution feels it, compensated along both axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from kdctl.config.section import STORED, Positive, Section
from kdctl.quant.quantizer import QuantizeContext, Quantizer, Statistic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from kdctl.config.preset import QuantizeSection
    from kdctl.quant.affine import QuantizedWeight, Weights


FLOAT32 = 4


class KlSettings(Section):
    """Settings of KL-aware rounding."""

    damping: Positive = 0.02
    """Share of the mean diagonal added to the Hessian by ``gptq`` and ``kl``."""
    output_damping: Positive = 0.2
    """Share of the mean diagonal added to the Fisher information of a layer's outputs by ``kl``."""
    output_block: Annotated[int, Field(ge=64), STORED] = 2048
    """Output features whose errors compensate one another in ``kl``; at 64 none do. Memory grows with it."""


class Kl(Quantizer):
    """Looks backward once for what outputs are worth, then works through the layers as GPTQ does."""

    name = "kl"
    needs = frozenset({Statistic.INPUT_HESSIAN, Statistic.OUTPUT_FISHER})
    settings = KlSettings
    packages = ()
    leaves_offsets = True

    def held(self, settings: QuantizeSection, layers: Mapping[str, tuple[int, int]]) -> int:
        """Return the bytes of every layer's blocks."""
        block = settings.of(KlSettings).output_block
        return sum(FLOAT32 * (rows // block * block**2 + (rows % block) ** 2) for rows, _ in layers.values())

    def rounding(self, settings: QuantizeSection, layers: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
        """Return the bytes and operators of rounding diagonal after diagonal of tiles, each layer by itself."""
        from kdctl.quant.two_sided import ROWS

        block, group, started = settings.of(KlSettings).output_block, settings.group_size, 0.0
        for rows, columns in layers.values():
            across, down = columns // group, -(-rows // ROWS)
            diagonals = across + -(-min(rows, block) // ROWS) - 1
            started += diagonals * (18 * group + 690) + 4 * across * down
        return 5400.0 * sum(rows * columns for rows, columns in layers.values()), started

    def quantize(self, context: QuantizeContext) -> Weights:
        """Quantize the teacher's layers in order, on calibration sequences."""
        import torch

        from kdctl.quant.calibrate import quantize_in_order
        from kdctl.quant.fisher import output_fisher
        from kdctl.quant.two_sided import two_sided

        own, layers = context.settings.of(KlSettings), context.layers
        with context.reporter.task("measuring what each layer's outputs are worth", "passes") as advance:
            fisher = output_fisher(context.teacher, layers, context.batches, own.output_block, context.seed, advance)

        def rounded(names: tuple[str, ...], weight: Tensor, hessian: Tensor) -> QuantizedWeight:
            blocks = [block for name in names for block in fisher.pop(name).blocks]
            return two_sided(weight, hessian, blocks, context.grid, weight.dtype, own.damping, own.output_damping)

        sizes = [len(batch.input_ids) for batch in context.batches]
        weights = {name: torch.cat(found.tokens).split(sizes) for name, found in fisher.items()}
        with context.task() as advance:
            return quantize_in_order(context.teacher, layers, context.batches, rounded, advance, weights)


QUANTIZER = Kl()
