"""What an engine is made for, and what it has to do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from kdctl.base.progress import Reporter, Silent
from kdctl.config.preset import Form, RolloutSection
from kdctl.rollout.sampler import Item, Progress
from kdctl.rollout.sampling import Sampling
from kdctl.run.records import EngineRecord, Prompt, Rollout
from kdctl.system.distributed import ALONE, Processes

Finished = Callable[[int, Rollout], None]
Until = Callable[[int, Sequence[int]], bool]
"""Tells of an item's place and its completion so far whether nothing more of it is needed."""


class RolloutEngine(Protocol):
    """Completes prompts with one model's weights."""

    blocks_at_once: int
    """Blocks of a store that are worked on together; the last row of each may be told long before all are done."""

    def load(self, model: PreTrainedModel, policy_step: int) -> None:
        """Take up a model's weights as they are now, that many optimizer steps behind their first. Every process calls.

        Called before the first ``complete`` and before every other one that is to see new weights.
        """
        ...

    def complete(
        self,
        items: Sequence[Item],
        sampling: Sampling,
        policy_step: int = 0,
        progress: Progress | None = None,
        finished: Finished | None = None,
        until: Until | None = None,
    ) -> list[Rollout]:
        """Write a completion for each (prompt, sample index), in order.

        progress: told of tokens as they are drawn; finished: may be told of each item's place and completion; until:
        may be asked, to write no more than is needed.
        """
        ...

    def record(self) -> EngineRecord:
        """Describe itself for a manifest: only a store of a reproducible one can be written again."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return what is worth a line of ``metrics.jsonl`` about the last ``load``."""
        ...

    def close(self) -> None:
        """Let go of what it holds besides memory."""
        ...


class WeightFiles(Protocol):
    """The weights that complete, as files for another program."""

    @property
    def log(self) -> Path:
        """Return where a program that is started for them writes what it prints."""
        ...

    @property
    def trained(self) -> bool:
        """Tell whether training changes the weights."""
        ...

    def start(self, form: Form) -> Path:
        """Return the weights as they are before the first optimizer step. Raises ServerError where there are none."""
        ...

    def write(self, form: Form, policy_step: int) -> Path:
        """Write the weights as they are now; every process calls."""
        ...

    def clear(self, policy_step: int = -1) -> None:
        """Remove what was written for other steps than one, or for all; every process calls."""
        ...


@dataclass(frozen=True)
class Work:
    """What an engine is made for. source: what rollouts say of who wrote them; name: what its caches go by.

    prompts: those to be completed, some of which may be looked at first; files: None where nobody else needs weights.
    """

    model: PreTrainedModel
    stop: tuple[int, ...]
    source: str
    settings: RolloutSection
    prompts: Sequence[Prompt] = ()
    files: WeightFiles | None = None
    name: str = ""
    reporter: Reporter = Silent()  # noqa: RUF009 - it says nothing and holds nothing
    processes: Processes = ALONE
