"""Rollouts to tensors without padding, and the pass that reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.model.attention import Layout, forward
from kdctl.run.records import Rollout
from kdctl.system.transfers import upload


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end, each prompt then completion; no token is padding.

    input_ids, position_ids: (N,) int64, tokens and their places in their sequences; predicting: (M,) int64, the tokens
    whose successor carries loss; seq_lens, counts: tokens, and tokens that carry loss, of each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    seq_lens: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def completion_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(self.counts)

    def targets(self) -> Tensor:
        """Return the tokens that carry loss, (M,)."""
        return self.input_ids[self.predicting + 1]

    def parts(self, size: int) -> list["Batch"]:
        """Cut into batches of at most ``size`` sequences, in order."""
        return [self._part(first, first + size) for first in range(0, len(self.seq_lens), size)]

    def _part(self, first: int, stop: int) -> "Batch":
        start, before = sum(self.seq_lens[:first]), sum(self.counts[:first])
        seq_lens, counts = self.seq_lens[first:stop], self.counts[first:stop]
        tokens, loss = slice(start, start + sum(seq_lens)), slice(before, before + sum(counts))
        return Batch(self.input_ids[tokens], self.position_ids[tokens], self.predicting[loss] - start, seq_lens, counts)

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, without waiting for it."""
        ids, position_ids, predicting = (
            upload(tensor, device) for tensor in (self.input_ids, self.position_ids, self.predicting)
        )
        return Batch(ids, position_ids, predicting, self.seq_lens, self.counts)


def split(rollouts: Sequence[Rollout], size: int) -> list[Sequence[Rollout]]:
    """Cut rollouts into parts of ``size``, in order."""
    return [rollouts[i : i + size] for i in range(0, len(rollouts), size)]


def collate(rollouts: Sequence[Rollout], max_tokens: int | None = None) -> Batch:
    """Lay rollouts end to end, cutting completions at ``max_tokens`` where it is given.

    What carries loss follows from lengths, never from token values: an end-of-sequence token counts like any other. The
    first token of a sequence has no predecessor and carries none.
    """
    sequences = [(r.prompt_ids + r.completion_ids)[:max_tokens] for r in rollouts]
    lengths = tuple(map(len, sequences))
    starts = accumulate(lengths[:-1], initial=0)
    first = [min(max(len(r.prompt_ids), 1), length) for r, length in zip(rollouts, lengths, strict=True)]
    predicting = [
        place
        for start, begin, length in zip(starts, first, lengths, strict=True)
        for place in range(start + begin - 1, start + length - 1)
    ]
    return Batch(
        torch.tensor([token for sequence in sequences for token in sequence]),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.tensor(predicting, dtype=torch.int64),
        lengths,
        tuple(length - begin for length, begin in zip(lengths, first, strict=True)),
    )


def predicting_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the final hidden states that predict completion tokens, (M, H), with what backward needs of them."""
    batch = batch.to(model.device)
    return forward(model, batch.input_ids, batch.position_ids, Layout(batch.seq_lens))[batch.predicting]


@torch.inference_mode()
def predicting_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the final hidden states that predict completion tokens, (M, H)."""
    return predicting_hidden(model, batch)
