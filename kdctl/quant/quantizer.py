"""What a post-training quantizer is: a name, what it needs, its own settings, and one function.

Imported wherever a preset is read, so torch is not imported here, nor at the top of any module of ``methods``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from kdctl.base.progress import Advance, Reporter, Silent
from kdctl.config.section import Section

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from kdctl.config.preset import QuantizeSection
    from kdctl.model.batch import Batch
    from kdctl.quant.affine import Grid, Weights


class Statistic(StrEnum):
    """What a quantizer takes from the teacher beside its weights. Any of them needs calibration sequences."""

    TOKENS = "tokens"
    """The sequences themselves."""
    INPUT_HESSIAN = "input_hessian"
    """Σ x·xᵀ over the tokens that reach a linear layer."""
    OUTPUT_FISHER = "output_fisher"
    """Σ g·gᵀ over the tokens that leave a linear layer, g the gradient of the model's own log-probabilities there."""


@dataclass(frozen=True)
class QuantizeContext:
    """What a quantizer works on. batches: calibration sequences, none where it needs no statistic."""

    teacher: PreTrainedModel
    layers: Sequence[str]
    settings: QuantizeSection
    batches: Sequence[Batch] = ()
    folder: Path | None = None
    """The teacher's files, for a quantizer that works in a process of its own."""
    seed: int = 0
    reporter: Reporter = field(default_factory=Silent)

    def task(self) -> AbstractContextManager[Advance]:
        """Open the progress bar of the layers."""
        return self.reporter.task(f"quantizing {len(self.layers)} layers with {self.settings.method}", "layers")

    @property
    def grid(self) -> Grid:
        """The grid that the settings ask for."""
        from kdctl.quant.affine import grid_of

        return grid_of(self.settings)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the scales: the teacher's."""
        return self.teacher.dtype


class Quantizer(Protocol):
    """A post-training method. Its settings are fields of the preset's section ``quantize``."""

    name: str
    needs: frozenset[Statistic]
    settings: type[Section]
    packages: tuple[str, ...]
    """Distributions that decide its numbers; their versions go on record."""
    leaves_offsets: bool = False
    """Its weights say where in their cells they were: a byte each, kept for training."""

    def check(self, settings: QuantizeSection) -> None:
        """Raise PresetError if a package is missing or the grid is not one that the method can fill."""

    def held(self, settings: QuantizeSection, layers: Mapping[str, tuple[int, int]]) -> int:
        """Return the bytes that it holds of all layers, (out_features, in_features) each, while it works."""
        return 0

    def rounding(self, settings: QuantizeSection, layers: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
        """Return the bytes that it reads and writes while it rounds all layers, and the operators that it starts.

        Here those of min-max; what statistics take is no part of it.
        """
        return 60.0 * sum(rows * columns for rows, columns in layers.values()), 22.0 * len(layers)

    def quantize(self, context: QuantizeContext) -> Weights:
        """Put each layer's weight on the grid. Leaves the teacher as it is."""
        ...
