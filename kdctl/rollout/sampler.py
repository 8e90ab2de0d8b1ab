"""Continuously batched sampling, exactly from the model.

A block of prompts is always generated from its start and its rows follow each other in a fixed order, so its tokens do
not depend on what ran before. Each token is drawn by inverting the cumulative distribution at a uniform number keyed by
(seed, policy step, prompt, sample, position). Nothing is inherited from the model's generation configuration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.base.rng import uniform
from kdctl.config.preset import RolloutSection
from kdctl.model.attention import Layout, RowCache, forward
from kdctl.model.head import rows_at_once
from kdctl.run.records import EngineRecord, Prompt, Rollout, SamplingRecord
from kdctl.system.cpu_products import packed

Progress = Callable[[int], None]
Item = tuple[Prompt, int]
"""A prompt and the index of its sample."""
PROMPT_TOKENS = 8192
"""Prompt tokens that are read in one pass."""
PREFIX = 128
"""Tokens that all prompts begin with, as examples of a task, from which they are read once for all."""
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


@dataclass
class Row:
    """One completion in the making."""

    prompt: Prompt
    sample_index: int
    place: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    enough: bool = False
    """Nobody needs more of it."""

    @property
    def length(self) -> int:
        """Tokens of prompt and completion so far."""
        return len(self.prompt.prompt_ids) + len(self.tokens)

    def finished(self, sampling: Sampling) -> bool:
        """Tell whether nothing more is to be drawn."""
        return self.stopped or self.enough or len(self.tokens) >= sampling.max_new_tokens


class InProcess:
    """Samples completions from a model in this process: what trains is what generates.

    stop: the tokens that end a completion. source: what the rollouts say about who wrote them. batch_size: completions
    in the making at once.
    """

    blocks_at_once = 1  # so that a block's tokens do not depend on what ran beside it

    def __init__(self, model: PreTrainedModel, stop: Sequence[int], source: str, batch_size: int = 64):
        self.model = model
        self.stop = set(stop)
        self.source = source
        self.batch_size = batch_size

    def load(self, model: PreTrainedModel, policy_step: int) -> None:
        """Take up a model; its weights are read where they are, so that nothing else is to be done."""
        self.model = model

    def record(self) -> EngineRecord:
        """Describe itself for a manifest."""
        return EngineRecord()

    def metrics(self) -> dict[str, float]:
        """Return nothing: what trains is what generates."""
        return {}

    def close(self) -> None:
        """Do nothing."""

    def complete(
        self,
        items: Sequence[Item],
        sampling: Sampling,
        policy_step: int = 0,
        progress: Progress | None = None,
        finished: Callable[[int, Rollout], None] | None = None,
        until: Callable[[int, Sequence[int]], bool] | None = None,
    ) -> list[Rollout]:
        """Generate a completion for each (prompt, sample index), in order. policy_step: steps behind the weights.

        until: told of an item's place and its tokens after each one, it may end the completion.
        """
        rows = [Row(prompt, sample, place) for place, (prompt, sample) in enumerate(items)]

        def drawn(active: list[Row]) -> None:
            if progress is not None:
                progress(len(active))
            for row in active:
                row.enough = until is not None and until(row.place, row.tokens)
                if finished is not None and row.finished(sampling):
                    finished(row.place, self._rollout(row, sampling.seed, policy_step))

        with torch.inference_mode(), packed(self.model):
            self._run(rows, sampling, policy_step, drawn)
        return [self._rollout(row, sampling.seed, policy_step) for row in rows]

    def _run(self, rows: list[Row], sampling: Sampling, policy_step: int, drawn: Callable[[list[Row]], None]) -> None:
        """Draw a token for every active row and step; a row that finishes makes room for a waiting one."""
        waiting = sorted(rows, key=lambda row: -len(row.prompt.prompt_ids))
        size = min(self.batch_size, len(rows))
        longest = max(len(row.prompt.prompt_ids) for row in rows)
        prefix = common_prefix([row.prompt.prompt_ids for row in rows])
        cache, active = RowCache(size + bool(prefix), longest + sampling.max_new_tokens), []
        if prefix:
            self._read(rows[0].prompt.prompt_ids[:prefix], cache)
        while active or waiting:
            admitted = _admit(waiting, size - len(active), prefix)
            logits = self._forward(active, admitted, cache, prefix)
            active += admitted
            self._draw(active, logits, sampling, policy_step)
            drawn(active)
            _retire(active, cache, sampling)

    def _read(self, tokens: Sequence[int], cache: RowCache) -> None:
        """Read what all prompts begin with into the cache's last row."""
        place = torch.arange(len(tokens), device=self.model.device)
        cache.point(torch.full_like(place, cache.rows - 1), place)
        forward(self.model, torch.tensor(tokens, device=place.device), place, Layout([len(tokens)], cache))

    def _forward(self, active: list[Row], admitted: list[Row], cache: RowCache, prefix: int) -> Tensor:
        """Read the active rows' last tokens and the admitted rows' prompts; return each row's next logits, (R, V).

        Rows admitted side by side with one prompt share its reading. prefix: tokens of every prompt that were read.
        """
        counts, device = [row.length for row in active], self.model.device
        tokens, rows = [row.tokens[-1] for row in active], list(range(len(active)))
        places, ends, shared = [count - 1 for count in counts], list(rows), []
        for _, group in groupby(enumerate(admitted, len(active)), key=lambda item: id(item[1].prompt)):
            slots, prompts = zip(*((slot, row.prompt.prompt_ids) for slot, row in group), strict=True)
            ids = prompts[0][prefix:]
            tokens += ids
            rows += [slots[0]] * len(ids)
            places += range(prefix, prefix + len(ids))
            ends += [len(tokens) - 1] * len(slots)
            shared.append((slots, len(ids)))
            if prefix:
                cache.copy(cache.rows - 1, slots[:1], prefix)
        place = torch.tensor(places, device=device)
        cache.point(torch.tensor(rows, device=device), place)
        count = torch.tensor(counts, dtype=torch.int64, device=device)
        layout = Layout([length for _, length in shared], cache, count, max(counts, default=0), prefix)
        hidden = forward(self.model, torch.tensor(tokens, device=device), place, layout)
        for slots, length in shared:
            cache.copy(slots[0], slots[1:], prefix + length)
        return self.model.get_output_embeddings()(hidden[ends])  # pyright: ignore[reportOptionalCall]

    def _draw(self, rows: list[Row], logits: Tensor, sampling: Sampling, policy_step: int) -> None:
        """Draw one token a row and note it with its unmasked log-probability at temperature 1."""
        device = logits.device
        keys = [(row.prompt.id, row.sample_index, len(row.tokens)) for row in rows]
        numbers = [uniform("token", sampling.seed, policy_step, *key) for key in keys]
        uniforms = torch.tensor(numbers, dtype=torch.float64, device=device)
        short = torch.tensor([len(row.tokens) < sampling.min_new_tokens for row in rows], device=device)
        stop = torch.zeros(logits.shape[-1], dtype=torch.bool, device=device)
        stop[list(self.stop)] = True
        few = rows_at_once(logits, len(rows))
        drawn = []
        for part in (slice(i, i + few) for i in range(0, len(rows), few)):
            values = logits[part].float()
            masked = values
            if sampling.min_new_tokens:
                masked = values.masked_fill(short[part, None] & stop, -torch.inf)
            tokens = sample(masked, uniforms[part], sampling)
            chosen = values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - values.logsumexp(-1)
            drawn += zip(tokens.tolist(), chosen.tolist(), strict=True)
        for row, (token, logprob) in zip(rows, drawn, strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.stopped = token in self.stop

    def _rollout(self, row: Row, seed: int, policy_step: int) -> Rollout:
        return Rollout(
            prompt_id=row.prompt.id,
            prompt_index=row.prompt.index,
            sample_index=row.sample_index,
            prompt_ids=row.prompt.prompt_ids,
            completion_ids=row.tokens,
            logprobs=row.logprobs,
            finish_reason="stop" if row.stopped else "length",
            policy_step=policy_step,
            seed=seed,
            source=self.source,
        )


def _retire(active: list[Row], cache: RowCache, sampling: Sampling) -> None:
    """Take finished rows out, moving the last row into each gap so that the active ones stay side by side."""
    for slot in reversed(range(len(active))):
        if active[slot].finished(sampling):
            last = active.pop()
            if slot < len(active):
                active[slot] = last
                cache.copy(len(active), [slot], last.length - 1)


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Count the tokens that all prompts begin with, less than any has; 0 where they are too few to be worth a pass."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    shared = next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), most)
    return min(shared, most) if len(prompts) > 1 and min(shared, most) >= PREFIX else 0


def _admit(waiting: list[Row], free: int, prefix: int) -> list[Row]:
    """Take the next rows that have a place, as many as are read in one pass without too large activations."""
    admitted: list[Row] = []
    tokens = 0
    while waiting and len(admitted) < free:
        tokens += len(waiting[0].prompt.prompt_ids) - prefix
        if admitted and tokens > PROMPT_TOKENS:
            break
        admitted.append(waiting.pop(0))
    return admitted


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
