"""Steps of decoding, each of which is the same operators on the same tensors, whatever the rows hold.

A pass over one token a row is thousands of operators, which take longer to start than a GPU takes to do them. Here a
step leaves all that changes on the device, places and random numbers too, so that a GPU does it from a recording.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.model.attention import Layout, RowCache, forward
from kdctl.rollout.sampling import Sampling, draw
from kdctl.system.replay import no_waiting, record, replays
from kdctl.system.transfers import upload

SPAN = 256
"""A recording attends to so many tokens a row or a multiple of it, as few as hold the longest row."""


class Steps:
    """Draws one token after the other for the first rows of a cache, and the host sees none meanwhile.

    rows: at most; places of the cache that hold no row are written to, at their first token. most: tokens that a row
    draws between two looks of the host. barred: (V,) bool, tokens that end a completion. say: told where a GPU cannot
    do steps from a recording.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: RowCache,
        rows: int,
        most: int,
        sampling: Sampling,
        barred: Tensor,
        say: Callable[[str], None],
    ):
        self.model, self.cache, self.sampling, self.barred, self.say = model, cache, sampling, barred, say
        device = model.device
        numbers = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self._first, self._tokens, self._lengths, self._limits, self._written = numbers
        self._uniforms = torch.zeros(most, rows, dtype=torch.float64, device=device)
        self._found = torch.zeros(2, most, rows, dtype=torch.float64, device=device)
        self._done = torch.zeros(1, dtype=torch.int64, device=device)
        self._row = torch.arange(rows, device=device)
        self._asked: set[int] = set()
        self._recorded: dict[int, Callable[[], None]] = {}

    def barred_before(self, written: Tensor) -> Tensor | None:
        """Return which tokens rows may not draw, (R, V), that have so many, (R,)."""
        if not self.sampling.min_new_tokens:
            return None
        return (written < self.sampling.min_new_tokens).unsqueeze(-1) & self.barred

    def draw(
        self,
        tokens: Tensor,
        lengths: Sequence[int],
        limits: Sequence[int],
        written: Sequence[int],
        uniforms: Tensor,
    ) -> Tensor:
        """Draw a token a row for each row of ``uniforms``, (steps, R); return them and their log-probabilities.

        tokens: (R,), the last of each row, unread; lengths, limits, written: tokens of prompt and completion with that
        one, at most, and of the completion. A row at its limit writes over its last token. Returns (2, steps, R)
        float64.
        """
        steps, rows = uniforms.shape
        self._lengths.fill_(1)
        self._limits.fill_(1)
        self._first[:rows] = tokens
        for place, numbers in ((self._lengths, lengths), (self._limits, limits), (self._written, written)):
            place[:rows] = upload(torch.tensor(numbers), tokens.device)
        self._uniforms[:steps, :rows] = uniforms
        self._rewind()
        longest = max(min(length + steps - 1, limit) for length, limit in zip(lengths, limits, strict=True))
        step = self._way(min(-(-longest // SPAN) * SPAN, self.cache.capacity))
        for _ in range(steps):
            step()
        return self._found[:, :steps, :rows].clone()

    def _rewind(self) -> None:
        """Begin again with what was given."""
        self._tokens.copy_(self._first)
        self._done.zero_()

    def _way(self, span: int) -> Callable[[], None]:
        """Return what does a step; the second time that a span is asked for it is recorded."""
        step = partial(self._step, span)
        if not replays(self._tokens) or span not in self._asked:
            self._asked.add(span)
            return step
        if span not in self._recorded:
            self._recorded[span] = self._record(step)
        return self._recorded[span]

    def _record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record a step and prove that the recording does the same; where it cannot, say so and return the step."""
        try:
            with no_waiting():
                step()
            expected = self._found[:, :1].clone()
            self._rewind()
            replay = record(step)
            self._rewind()
            self._found.fill_(torch.nan)
            replay()
            why = "" if torch.equal(self._found[:, :1], expected) else "its recording gives other numbers"
        except RuntimeError as error:
            why = str(error).splitlines()[0]
        self._rewind()
        if why:
            self.say(f"each operator of generation is started by itself, which takes longer: {why}")
        return step if why else replay

    def _step(self, span: int) -> None:
        """Read each row's last token and draw its next."""
        counts = torch.minimum(self._lengths + self._done, self._limits)
        place = counts - 1
        self.cache.point(self._row, place)
        hidden = forward(self.model, self._tokens, place, Layout((), self.cache, counts, span))
        logits = self.model.get_output_embeddings()(hidden)  # pyright: ignore[reportOptionalCall]
        uniforms = self._uniforms.index_select(0, self._done)[0]
        tokens, logprobs = draw(logits, uniforms, self.barred_before(self._written + self._done), self.sampling)
        self._found.index_copy_(1, self._done, torch.stack([tokens.double(), logprobs.double()]).unsqueeze(1))
        self._tokens.copy_(tokens)
        self._done += 1
