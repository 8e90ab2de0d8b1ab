"""What a step trains on, by the source of its prompts, where they come from several."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdctl.data.mixture import source_of, sources_of
from kdctl.model.batch import Batch
from kdctl.run.records import Rollout
from kdctl.system.distributed import Processes
from kdctl.system.transfers import upload


class BySource:
    """Adds up loss and tokens of one step by source; nothing where there is one."""

    def __init__(self, rollouts: Sequence[Rollout]):
        self.names = sources_of(rollout.prompt_id for rollout in rollouts)
        self._parts: list[tuple[Sequence[Rollout], Batch, Tensor]] = []

    def room(self, rollouts: Sequence[Rollout], batch: Batch) -> Tensor | None:
        """Return room for the loss of each token of a batch; None where there is one source."""
        if not self.names:
            return None
        each = torch.empty(batch.completion_tokens, dtype=torch.float32, device=batch.input_ids.device)
        self._parts.append((rollouts, batch, each))
        return each

    def sums(self) -> list[Tensor]:
        """Return the loss of each sequence of each batch, on the device, for ``metrics``."""
        return [
            torch.segment_reduce(each, "sum", lengths=upload(torch.tensor(batch.counts), each.device), unsafe=True)
            for _, batch, each in self._parts
        ]

    def metrics(self, sums: Sequence[Sequence[float]], objective: str, processes: Processes) -> dict[str, float]:
        """Return the mean loss per completion token and the tokens of each source, over all processes."""
        loss, tokens = dict.fromkeys(self.names, 0.0), dict.fromkeys(self.names, 0)
        for (rollouts, batch, _), values in zip(self._parts, sums, strict=True):
            for rollout, value, count in zip(rollouts, values, batch.counts, strict=True):
                loss[source_of(rollout.prompt_id)] += value
                tokens[source_of(rollout.prompt_id)] += count
        found: dict[str, float] = {}
        for name in self.names:
            count = int(processes.total(tokens[name]))
            found[f"train/completion_tokens/{name}"] = count
            found[f"train/{objective}/{name}"] = processes.total(loss[name]) / count if count else 0.0
        return found
