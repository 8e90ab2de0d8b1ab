"""The frozen output head that teacher and student share, and how many logits are in memory at once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdctl.base.errors import ModelError

ROWS_IN_CACHE = 16
"""Positions whose float32 logits are worked on at once on a CPU: a few megabytes that stay in its cache."""
LOGITS_ON_CPU = 64 * 2**20
GPU_SHARE = 256
"""A GPU's memory divided by the logits in it: large enough that reading the output head costs less than multiplying."""


@dataclass(frozen=True)
class Head:
    """Frozen output head shared by teacher and student: logits = hidden @ weight.T + bias."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None

    @property
    def chunk(self) -> int:
        """Positions that are multiplied at once where the head lies."""
        device = self.weight.device
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        return token_chunk(len(self.weight), logits_budget(memory))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Multiply (N, H) hidden states to (N, V) logits in the head's dtype."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply (N, H) hidden states to (N, V) logits, computed in the head's dtype, in float32."""
        return self(hidden).float()


def head_of(model: PreTrainedModel) -> Head:
    """Return the frozen output head."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        raise ModelError(f"model type {model.config.model_type!r} has no linear output head to share")
    return Head(module.weight.detach(), module.bias.detach() if module.bias is not None else None)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ModelError unless logits are exactly lm_head(final hidden state)."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.equal(head_of(model).logits(hidden), model(input_ids=ids).logits.float()):
        raise ModelError(
            f"model type {model.config.model_type!r} does more than one linear layer between its final hidden states "
            "and its logits (capping or scaling after the output head, or layers before it), and kdctl computes "
            "divergences from final hidden states and would train on another distribution"
        )


def token_chunk(vocabulary: int, budget_bytes: int = LOGITS_ON_CPU) -> int:
    """Choose how many positions to multiply at once: two float32 rows of logits each within the budget, at least 16."""
    return max(16, math.floor(budget_bytes / (2 * 4 * vocabulary)))


def logits_budget(memory_bytes: int | None) -> int:
    """Return how many bytes of logits are in memory at once: a 256th of a GPU's, little on a CPU (None)."""
    return LOGITS_ON_CPU if memory_bytes is None else max(LOGITS_ON_CPU, memory_bytes // GPU_SHARE)


def rows_at_once(tensor: Tensor, count: int) -> int:
    """Return how many of ``count`` positions are worked on at once where a tensor lies: on a CPU those in its cache."""
    return ROWS_IN_CACHE if tensor.device.type == "cpu" else count
