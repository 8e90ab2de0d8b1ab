"""Engines: what writes completions. An entry of ``ENGINES`` is all that one needs to be chosen by a preset."""

from collections.abc import Callable, Sequence
from typing import Protocol

from transformers import PreTrainedModel

from kdctl.base.errors import PresetError
from kdctl.config.resolve import suggest
from kdctl.rollout.sampler import InProcess, Item, Progress, Sampling
from kdctl.run.records import EngineRecord, Rollout


class RolloutEngine(Protocol):
    """Completes prompts with one model's weights."""

    name: str
    """Its name in presets and manifests."""
    reproducible: bool
    """Whether equal weights, items and sampling give equal tokens; only such a store can be written again."""

    def load(self, model: PreTrainedModel, policy_step: int) -> None:
        """Take up a model's weights as they are now, that many optimizer steps behind their first. Every process calls.

        Called before every ``complete`` that is to see new weights, and never needed after construction.
        """
        ...

    def complete(
        self, items: Sequence[Item], sampling: Sampling, policy_step: int = 0, progress: Progress | None = None
    ) -> list[Rollout]:
        """Write a completion for each (prompt, sample index), in order. progress: told of tokens as they are drawn."""
        ...


Make = Callable[[PreTrainedModel, Sequence[int], str, int], RolloutEngine]
"""Makes an engine for a model, its stop tokens, what rollouts say of who wrote them, and completions at once."""

ENGINES: dict[str, Make] = {"transformers": InProcess}


def record_of(engine: RolloutEngine) -> EngineRecord:
    """Describe an engine for a manifest."""
    return EngineRecord(name=engine.name, reproducible=engine.reproducible)


def engine_named(name: str) -> Make:
    """Return an entry of ``ENGINES``. Raises PresetError for an unknown name."""
    if name not in ENGINES:
        raise PresetError(f"rollout.engine={name!r}: no such engine{suggest(name, ENGINES)}; use {', '.join(ENGINES)}")
    return ENGINES[name]
