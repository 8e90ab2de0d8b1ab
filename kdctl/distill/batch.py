"""Rollouts to tensors, and which rollouts a step uses.

Row r of step t owns slot t·B + r, B rows a step. A hash of (seed, step, row) decides with probability λ whether the
slot is filled on-policy; the slot alone decides which prompt it takes from a source. Nothing depends on what ran
before, so a resumed run, another split into micro-batches or another number of processes sees the same data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdctl.keyed import shuffled_index, uniform
from kdctl.records import Rollout


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences, prompt then completion.

    input_ids, attention_mask: (B, T) int64; completion_mask: (B, T) bool, the tokens that carry loss.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    @property
    def completion_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(self.completion_mask.sum())

    def predicting(self, hidden: Tensor) -> Tensor:
        """Select from (B, T, H) hidden states those that predict a completion token, (N, H) in row order."""
        return hidden[:, :-1][self.completion_mask[:, 1:]]

    def targets(self) -> Tensor:
        """Return the completion tokens in the order of ``predicting``, (N,)."""
        return self.input_ids[:, 1:][self.completion_mask[:, 1:]]

    def to(self, device: torch.device) -> "Batch":
        """Move to a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.completion_mask.to(device))


def collate(rollouts: Sequence[Rollout], pad_id: int, max_tokens: int) -> Batch:
    """Pad rollouts to one rectangle, cutting completions at ``max_tokens``.

    Masks come from lengths, never from token values: an end-of-sequence token that is also the padding token carries
    loss like any other.
    """
    sequences = [(r.prompt_ids + r.completion_ids)[:max_tokens] for r in rollouts]
    width = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(rollouts), width), pad_id)
    attention = torch.zeros(len(rollouts), width, dtype=torch.int64)
    completion = torch.zeros(len(rollouts), width, dtype=torch.bool)
    for row, (rollout, sequence) in enumerate(zip(rollouts, sequences, strict=True)):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention[row, : len(sequence)] = 1
        completion[row, len(rollout.prompt_ids) : len(sequence)] = True
    return Batch(input_ids, attention, completion)


def micro_batches(rollouts: Sequence[Rollout], size: int, pad_id: int, max_tokens: int) -> list[Batch]:
    """Split one step's rollouts into batches of ``size``, like lengths together to save padding."""
    ordered = sorted(rollouts, key=lambda r: len(r.prompt_ids) + len(r.completion_ids))
    return [collate(ordered[i : i + size], pad_id, max_tokens) for i in range(0, len(ordered), size)]


def on_policy_rows(seed: int, step: int, rows: int, lmbda: float) -> list[bool]:
    """Draw which rows of a step are student-generated: row r where uniform(seed, step, r) < λ."""
    return [uniform("lambda", seed, step, row) < lmbda for row in range(rows)]


def slot_index(slot: int, count: int, seed: int, source: str) -> int:
    """Return which of a source's ``count`` items fills a slot: reshuffled passes over all of them."""
    return shuffled_index(slot, count, "order", seed, source)
