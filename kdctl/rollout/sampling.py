"""How one token is drawn from logits: which ones may be, and which of them a uniform number falls on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdctl.config.preset import RolloutSection
from kdctl.model.head import rows_at_once
from kdctl.run.records import SamplingRecord

SPAN = 256
"""Tokens of the vocabulary whose weights are summed up first when one is drawn."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; ``min_new_tokens`` masks the stop tokens before it."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    min_new_tokens: int
    seed: int

    @classmethod
    def of(cls, settings: RolloutSection) -> "Sampling":
        """Take the sampling fields of a preset section."""
        return cls(
            settings.temperature,
            settings.top_p,
            settings.top_k,
            settings.max_new_tokens,
            settings.min_new_tokens,
            settings.seed,
        )

    def record(self) -> SamplingRecord:
        """Describe the sampling for a manifest."""
        return SamplingRecord(**vars(self))


def draw(logits: Tensor, uniforms: Tensor, barred: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token a row; return it and its log-probability, unmasked and at temperature 1, (R,) each.

    logits: (R, V) in any dtype; uniforms: (R,) float64; barred: (R, V) bool, tokens that may not be drawn. A few rows
    at a time are worked on in float32.
    """
    found = []
    few = rows_at_once(logits, len(logits))
    for first in range(0, len(logits), few):
        part = slice(first, first + few)
        values = logits[part].float()
        masked = values if barred is None else values.masked_fill(barred[part], -torch.inf)
        tokens = sample(masked, uniforms[part], sampling)
        found.append((tokens, values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - values.logsumexp(-1)))
    tokens, logprobs = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    logits: (B, V) float32; uniforms: (B,) float64 in [0, 1). Returns (B,) int64. Temperature 0 is greedy.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    if sampling.top_k:
        kept = scaled.topk(min(sampling.top_k, scaled.shape[-1]))  # k tokens even where logits are equal
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, kept.indices, kept.values)
    if sampling.top_p < 1:
        return invert(nucleus(scaled.softmax(-1), sampling.top_p), uniforms)
    return invert((scaled - scaled.amax(-1, keepdim=True)).exp_(), uniforms)


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token of each row on whose share of the unit interval its uniform number falls.

    weights: (B, V) float32, not negative, of any sum. First the span of tokens is found, then the token in it, so that
    nothing as long as the vocabulary is summed up in float64. A token of weight zero is never returned.
    """
    spans = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % SPAN)).unflatten(-1, (-1, SPAN))
    cumulative = spans.sum(-1).double().cumsum(-1)
    total = cumulative[:, -1:]
    target = _below(uniforms.unsqueeze(-1) * total, total)
    span = torch.searchsorted(cumulative, target, right=True)
    before = torch.where(span > 0, cumulative.gather(-1, (span - 1).clamp(min=0)), 0.0)
    within = spans.gather(1, span.unsqueeze(-1).expand(-1, 1, SPAN)).squeeze(1).double().cumsum(-1)
    return (span * SPAN + torch.searchsorted(within, _below(target - before, within[:, -1:]), right=True)).squeeze(-1)


def _below(values: Tensor, limit: Tensor) -> Tensor:
    """Keep values under a limit also after rounding, so that the place found has a weight above zero."""
    return torch.minimum(values, torch.nextafter(limit, torch.zeros_like(limit)))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of likeliest tokens whose mass reaches ``top_p`` (Holtzman et al. 2020)."""
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return probabilities.scatter(-1, index, ordered.masked_fill(before >= top_p, 0.0))
