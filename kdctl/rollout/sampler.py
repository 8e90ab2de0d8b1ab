"""Continuously batched sampling, exactly from the model.

A block of prompts is always generated from its start and its rows follow each other in a fixed order, so its tokens do
not depend on what ran before. Each token is drawn by inverting the cumulative distribution at a uniform number keyed by
(seed, policy step, prompt, sample, position). Nothing is inherited from the model's generation configuration.

What is being written lies on the device. The host looks at it every few tokens: what a row wrote after its end is
forgotten, and rows that wait take the places of those that ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.base.progress import Silent
from kdctl.base.rng import uniform
from kdctl.model.attention import Layout, RowCache, forward
from kdctl.rollout.sampling import Sampling, draw
from kdctl.rollout.steps import Steps
from kdctl.run.records import EngineRecord, Prompt, Rollout
from kdctl.system.cpu_products import packed
from kdctl.system.transfers import upload

Progress = Callable[[int], None]
Item = tuple[Prompt, int]
"""A prompt and the index of its sample."""
PROMPT_TOKENS = 8192
"""Prompt tokens that are read in one pass."""
LOOK_ON_GPU = 16
"""Tokens that each row draws before the host looks: it waits that much more seldom, and half as many are in vain."""
PREFIX = 128
"""Tokens that all prompts begin with, as examples of a task, from which they are read once for all."""


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
    in the making at once. look: tokens a row that are drawn before the host looks at them. say: told what
    makes it slow.
    """

    blocks_at_once = 1  # so that a block's tokens do not depend on what ran beside it

    def __init__(
        self,
        model: PreTrainedModel,
        stop: Sequence[int],
        source: str,
        batch_size: int = 64,
        look: int | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self.model = model
        self.stop = set(stop)
        self.source, self.say = source, say or Silent().note
        self.batch_size = batch_size
        self.look = look or (LOOK_ON_GPU if model.device.type == "cuda" else 1)

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

        def drawn(rows: list[Row]) -> None:
            if progress is not None:
                progress(len(rows))
            for row in rows:
                row.enough = until is not None and until(row.place, row.tokens)
                if finished is not None and row.finished(sampling):
                    finished(row.place, self._rollout(row, sampling.seed, policy_step))

        with torch.inference_mode(), packed(self.model):
            self._run(rows, sampling, policy_step, drawn)
        return [self._rollout(row, sampling.seed, policy_step) for row in rows]

    def _run(self, rows: list[Row], sampling: Sampling, policy_step: int, drawn: Callable[[list[Row]], None]) -> None:
        """Draw tokens for all active rows; a row that finishes makes room for a waiting one."""
        waiting = sorted(rows, key=lambda row: -len(row.prompt.prompt_ids))
        size = min(self.batch_size, len(rows))
        longest = max(len(row.prompt.prompt_ids) for row in rows)
        prefix = common_prefix([row.prompt.prompt_ids for row in rows])
        cache, active = RowCache(size + bool(prefix), longest + sampling.max_new_tokens), []
        steps = self._steps(cache, size, sampling)
        if prefix:
            self._read(rows[0].prompt.prompt_ids[:prefix], cache)
        while active or waiting:
            admitted = _admit(waiting, size - len(active), prefix)
            logits = self._forward(active, admitted, cache, prefix)
            active += admitted
            found = self._draw_on(active, logits, steps, policy_step)
            self._note(active, found.tolist(), sampling, drawn)
            _retire(active, cache, sampling)

    def _read(self, tokens: Sequence[int], cache: RowCache) -> None:
        """Read what all prompts begin with into the cache's last row."""
        place = torch.arange(len(tokens), device=self.model.device)
        cache.point(torch.full_like(place, cache.rows - 1), place)
        forward(self.model, self._upload(tokens), place, Layout([len(tokens)], cache))

    def _forward(self, active: list[Row], admitted: list[Row], cache: RowCache, prefix: int) -> Tensor:
        """Read the active rows' last tokens and the admitted rows' prompts; return each row's next logits, (R, V).

        Rows admitted side by side with one prompt share its reading. prefix: tokens of every prompt that were read.
        """
        counts = [row.length for row in active]
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
        place = self._upload(places)
        cache.point(self._upload(rows), place)
        layout = Layout([length for _, length in shared], cache, self._upload(counts), max(counts, default=0), prefix)
        hidden = forward(self.model, self._upload(tokens), place, layout)
        for slots, length in shared:
            cache.copy(slots[0], slots[1:], prefix + length)
        return self.model.get_output_embeddings()(hidden[self._upload(ends)])  # pyright: ignore[reportOptionalCall]

    def _draw_on(self, rows: list[Row], logits: Tensor, steps: Steps, policy_step: int) -> Tensor:
        """Draw ``look`` tokens a row, and read none; return them and their log-probabilities, (2, steps, R) float64.

        logits: (R, V), of the first. A row that may have no more writes over its last token.
        """
        sampling = steps.sampling
        limits = [len(row.prompt.prompt_ids) + sampling.max_new_tokens for row in rows]
        count = min(self.look, max(limit - row.length for limit, row in zip(limits, rows, strict=True)))
        numbers = torch.tensor(_uniforms(rows, count, sampling, policy_step), dtype=torch.float64)
        uniforms, written = upload(numbers, logits.device), [len(row.tokens) for row in rows]
        barred = steps.barred_before(self._upload(written)) if sampling.min_new_tokens else None
        tokens, logprobs = draw(logits, uniforms[0], barred, sampling)
        first = torch.stack([tokens.double(), logprobs.double()]).unsqueeze(1)
        if count == 1:
            return first
        lengths, written = [row.length + 1 for row in rows], [each + 1 for each in written]
        return torch.cat([first, steps.draw(tokens, lengths, limits, written, uniforms[1:])], 1)

    def _note(
        self,
        rows: list[Row],
        found: Sequence[Sequence[Sequence[float]]],
        sampling: Sampling,
        drawn: Callable[[list[Row]], None],
    ) -> None:
        """Give rows the tokens that they drew, with their log-probabilities, up to their ends."""
        for step in zip(*found, strict=True):
            going = [each for each in zip(rows, *step, strict=True) if not each[0].finished(sampling)]
            for row, token, logprob in going:
                row.tokens.append(int(token))
                row.logprobs.append(logprob)
                row.stopped = row.tokens[-1] in self.stop
            drawn([row for row, _, _ in going])

    def _steps(self, cache: RowCache, rows: int, sampling: Sampling) -> Steps:
        """Make what draws between two looks."""
        barred = torch.zeros(self.model.get_output_embeddings().weight.shape[0], dtype=torch.bool)  # pyright: ignore
        barred[list(self.stop)] = True
        most = max(1, self.look - 1)
        return Steps(self.model, cache, rows, most, sampling, upload(barred, self.model.device), self.say)

    def _upload(self, numbers: Sequence[int]) -> Tensor:
        return upload(torch.tensor(numbers, dtype=torch.int64), self.model.device)

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


def _uniforms(rows: list[Row], steps: int, sampling: Sampling, policy_step: int) -> list[list[float]]:
    """Return the uniform numbers that the next tokens of each row are drawn with, a list a step."""
    if not sampling.temperature:
        return [[0.0] * len(rows)] * steps
    keys = [(row.prompt.id, row.sample_index, len(row.tokens)) for row in rows]
    return [
        [uniform("token", sampling.seed, policy_step, prompt, index, written + step) for prompt, index, written in keys]
        for step in range(steps)
    ]


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
