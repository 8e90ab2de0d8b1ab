"""Batched sampling, exactly from the model.

One block of prompts is one batch, always generated from its start, so its tokens do not depend on what ran before. Each
token is drawn by inverting the cumulative distribution at a uniform number keyed by (seed, policy step, prompt, sample,
position). Nothing is inherited from the model's generation configuration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kdctl.keyed import uniform
from kdctl.models import cached_hidden, head_of
from kdctl.preset import RolloutSection
from kdctl.records import Prompt, Rollout, SamplingRecord

Progress = Callable[[int], None]


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


@dataclass
class Row:
    """One completion in the making."""

    prompt: Prompt
    sample_index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    def finished(self, sampling: Sampling) -> bool:
        """Tell whether nothing more is to be drawn."""
        return self.stopped or len(self.tokens) >= sampling.max_new_tokens


class Generator:
    """Samples completions from one model.

    stop: the tokens that end a completion. policy_step: optimizer steps behind the model's weights. source: what the
    rollouts say about who wrote them.
    """

    def __init__(self, model: PreTrainedModel, stop: Sequence[int], pad_id: int, sampling: Sampling, source: str):
        self.model = model
        self.head = head_of(model)
        self.stop = set(stop)
        self.pad_id = pad_id
        self.sampling = sampling
        self.source = source

    def block(
        self, items: Sequence[tuple[Prompt, int]], policy_step: int = 0, progress: Progress | None = None
    ) -> list[Rollout]:
        """Generate a completion for each (prompt, sample index), in order."""
        rows = [Row(prompt, sample) for prompt, sample in items]
        with torch.inference_mode():
            self._run(rows, policy_step, progress)
        return [self._rollout(row, policy_step) for row in rows]

    def _run(self, rows: list[Row], policy_step: int, progress: Progress | None) -> None:
        """Prefill, then draw one token a row and step until every row has finished."""
        ids, mask = self._left_padded(rows)
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, cache)
        active = rows
        while True:
            tokens = self._draw(active, logits, policy_step)
            if progress is not None:
                progress(len(active))
            keep = [i for i, row in enumerate(active) if not row.finished(self.sampling)]
            if not keep:
                return
            if len(keep) < len(active):
                index = torch.tensor(keep, device=ids.device)
                cache.batch_select_indices(index)
                tokens, mask, active = tokens[index], mask[index], [active[i] for i in keep]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], -1)
            logits = self._forward(tokens.unsqueeze(-1), mask, cache)

    def _left_padded(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        width = max(len(row.prompt.prompt_ids) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, width - len(row.prompt.prompt_ids) :] = torch.tensor(row.prompt.prompt_ids)
            mask[i, width - len(row.prompt.prompt_ids) :] = 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def _forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Return the next token's logits, (B, V) float32."""
        # Two-dimensional on purpose: a slice of a batch of sequences times the head would copy the head once a row.
        return self.head.logits(cached_hidden(self.model, ids, mask, cache)[:, -1])

    def _draw(self, rows: list[Row], logits: Tensor, policy_step: int) -> Tensor:
        """Draw one token a row and note it with its unmasked log-probability at temperature 1."""
        position = len(rows[0].tokens)
        numbers = [
            uniform("token", self.sampling.seed, policy_step, row.prompt.id, row.sample_index, position) for row in rows
        ]
        masked = logits
        if position < self.sampling.min_new_tokens:
            masked = logits.index_fill(-1, torch.tensor(sorted(self.stop), device=logits.device), -torch.inf)
        uniforms = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
        tokens = sample(masked, uniforms, self.sampling)
        logprobs = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.stopped = token in self.stop
        return tokens

    def _rollout(self, row: Row, policy_step: int) -> Rollout:
        return Rollout(
            prompt_id=row.prompt.id,
            prompt_index=row.prompt.index,
            sample_index=row.sample_index,
            prompt_ids=row.prompt.prompt_ids,
            completion_ids=row.tokens,
            logprobs=row.logprobs,
            finish_reason="stop" if row.stopped else "length",
            policy_step=policy_step,
            seed=self.sampling.seed,
            source=self.source,
        )


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    logits: (B, V) float32; uniforms: (B,) float64 in [0, 1). Returns (B,) int64. Temperature 0 is greedy.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits / sampling.temperature
    if sampling.top_k:
        kept = scaled.topk(min(sampling.top_k, scaled.shape[-1]))  # k tokens even where logits are equal
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, kept.indices, kept.values)
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Below the total even after rounding, so that the token found always has a probability above zero.
    targets = torch.minimum(uniforms.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of likeliest tokens whose mass reaches ``top_p`` (Holtzman et al. 2020)."""
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return probabilities.scatter(-1, index, ordered.masked_fill(before >= top_p, 0.0))
