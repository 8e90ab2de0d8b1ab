"""AutoRound: rounding and clipping tuned by signed gradients, with Intel's package auto-round, which is optional."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from kdctl.base.errors import PresetError
from kdctl.config.section import Count, Section
from kdctl.quant.quantizer import QuantizeContext, Quantizer, Statistic

if TYPE_CHECKING:
    from kdctl.config.preset import QuantizeSection
    from kdctl.quant.affine import Weights

INSTALL = 'pip install "kdctl[autoround]"'


class AutoroundSettings(Section):
    """Settings of AutoRound."""

    autoround_iters: Count = 200
    """Steps of ``autoround`` on each decoder layer."""


class Autoround(Quantizer):
    """Works in a process of its own, which reads the teacher from its folder."""

    name = "autoround"
    needs = frozenset({Statistic.TOKENS})
    settings = AutoroundSettings
    packages = ("auto-round",)

    def check(self, settings: QuantizeSection) -> None:
        """Raise PresetError unless auto-round is installed; it is found without being imported."""
        if find_spec("auto_round") is None:
            reason = "quantize.method=autoround needs the package auto-round, which is not installed; install it:"
            raise PresetError(f"{reason}\n{INSTALL}")

    def quantize(self, context: QuantizeContext) -> Weights:
        """Tune each decoder layer on calibration sequences."""
        from kdctl.quant.autoround import autoround, task_of

        self.check(context.settings)
        with context.task() as advance:
            return autoround(task_of(context), context.batches, advance)


QUANTIZER = Autoround()
