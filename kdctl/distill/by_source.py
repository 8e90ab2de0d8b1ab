"""What a step trains on, by the source of its prompts, where they come from several."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdctl.data.mixture import source_of, sources_of
from kdctl.model.batch import Batch
from kdctl.run.records import Rollout
from kdctl.system.distributed import Processes


class BySource:
    """Adds up loss and tokens of one step by source; nothing where there is one."""

    def __init__(self, rollouts: Sequence[Rollout], device: torch.device):
        self.names = sources_of(rollout.prompt_id for rollout in rollouts)
        self.device = device
        self._parts: list[tuple[Sequence[Rollout], Batch, Tensor]] = []

    def room(self, rollouts: Sequence[Rollout], batch: Batch) -> Tensor | None:
        """Return room for the loss of each token of a batch; None where there is one source."""
        if not self.names:
            return None
        each = torch.empty(batch.completion_tokens, dtype=torch.float32, device=self.device)
        self._parts.append((rollouts, batch, each))
        return each

    def metrics(self, objective: str, processes: Processes) -> dict[str, float]:
        """Return the mean loss per completion token and the tokens of each source, over all processes."""
        loss, tokens = dict.fromkeys(self.names, 0.0), dict.fromkeys(self.names, 0)
        for rollouts, batch, each in self._parts:
            for rollout, values in zip(rollouts, each.cpu().split(batch.counts), strict=True):
                loss[source_of(rollout.prompt_id)] += float(values.sum())
                tokens[source_of(rollout.prompt_id)] += len(values)
        found: dict[str, float] = {}
        for name in self.names:
            count = int(processes.total(tokens[name]))
            found[f"train/completion_tokens/{name}"] = count
            found[f"train/{objective}/{name}"] = processes.total(loss[name]) / count if count else 0.0
        return found
