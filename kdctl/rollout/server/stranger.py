"""A server that serves whatever it serves: nobody here has its weights, so it can be asked and not checked.

What is made sure of is that it means the same by tokens as a model that is here, and reads what it is sent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kdctl.base.errors import ServerError
from kdctl.base.rng import digest
from kdctl.model.context import reach_of
from kdctl.rollout.sampler import Item, Progress
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.server.rules import log_probabilities
from kdctl.rollout.server.trust import first_tokens, with_token
from kdctl.rollout.server.writer import Writer
from kdctl.rollout.work import Finished, Until, Work
from kdctl.run.records import EngineRecord, Prompt, Rollout

FIXED = 16
"""Completions on which is looked for a token that a server puts before prompts."""


@dataclass
class Stranger:
    """Has one server complete and score. work: its model is the one that is here, ``settings.url`` the address."""

    work: Work
    blocks_at_once: int = 1

    def __post_init__(self) -> None:
        name = f"{digest('stranger', *self.work.settings.url):x}"
        self._writer = Writer.of(replace(self.work, name=name))

    @property
    def described(self) -> str:
        """Say what it is and what it serves."""
        (place,) = self._writer.pool.places
        return f"{place.described}, {place.about.model}"

    @property
    def reach(self) -> int | None:
        """Tokens of the longest sequence that it can be sent: it draws one more behind what it scores."""
        (place,) = self._writer.pool.places
        return None if place.about.reach is None else place.about.reach - 1

    def meet(self, sent: Sequence[Rollout]) -> None:
        """Find out what the server is, and whether it can be sent what is to be scored.

        Raises ServerError where it is away, of no kind that kdctl knows, takes shorter sequences only, or says that it
        read more than it was sent.
        """
        (place,) = self._writer.pool.meet()
        self.work.reporter.note(f"{place.described} serves {place.about.model}")
        self._check_reach(sent)
        first = Prompt(sent[0].prompt_id, sent[0].prompt_index, sent[0].prompt_ids)
        self._writer.find_stops(first.prompt_ids)
        self._writer.draw([(first, 0)], Sampling(1.0, 1.0, 0, 1, 0, 0), 0)

    def check(self, sent: Sequence[Rollout], said: Sequence[float]) -> None:
        """Look at what it said of completions by the model that is here.

        Raises ServerError where it means other things by tokens, so that it would do better to guess, or reads a token
        before a prompt that was not sent.
        """
        (place,) = self._writer.pool.places
        there = torch.tensor(said).float()
        if -there.mean().item() > math.log(self._writer.vocabulary):
            raise ServerError(
                f"{place.described} gives the tokens of the first model's own text {there.mean():.1f} nats each, less "
                f"than a guess among all {self._writer.vocabulary} would: it means other things by them. Compare "
                "models of one tokenizer"
            )
        parts = zip(sent, there.split([len(one.completion_ids) for one in sent]), strict=True)
        looked = [(one, values) for one, values in parts if self._has_room(one)][-FIXED:]
        if any(self._adds(token, looked) for token in first_tokens(self.work.model.config, sent[0].prompt_ids)):
            raise ServerError(
                f"{place.described} puts a token before the prompt that was not sent, as a second beginning of "
                "sequence: one more that is sent changes what a third one would. Switch that off there, or in the "
                "tokenizer beside its weights"
            )

    def _has_room(self, one: Rollout) -> bool:
        """Tell whether two tokens more can be put before a completion's prompt, here and there."""
        longest = len(one.prompt_ids) + len(one.completion_ids) + 2
        return reach_of(self.work.model.config).has(longest) and (self.reach is None or longest <= self.reach)

    def _adds(self, token: int | None, looked: Sequence[tuple[Rollout, Tensor]]) -> bool:
        """Tell whether a server has put a token before prompts already, by what one that is sent changes there.

        It is compared with what one token changes in the model that is here, and with what a second one does: weights
        may differ, and are the same on both sides of each change.
        """
        if not looked:
            return False
        fixed, plain = [one for one, _ in looked], torch.cat([values for _, values in looked])
        once, twice = with_token(fixed, token), with_token(with_token(fixed, token), token)
        here = [log_probabilities(self.work.model, rows) for rows in (fixed, once, twice)]
        there = torch.tensor(self.score(once)).float() - plain
        first, second = ((there - (after - before)).square().sum() for before, after in pairwise(here))
        return bool(second < first / 2)

    def load(self, model: object, policy_step: int) -> None:
        """Do nothing: it has weights of its own."""

    def complete(
        self,
        items: Sequence[Item],
        sampling: Sampling,
        policy_step: int = 0,
        progress: Progress | None = None,
        finished: Finished | None = None,
        until: Until | None = None,
    ) -> list[Rollout]:
        """Have a completion written for each (prompt, sample index), in order; finished: told of each as it comes.

        until: not asked, since an answer comes when it is whole.
        """
        return self._writer.draw(items, sampling, policy_step, progress, finished)

    def score(self, rollouts: Sequence[Rollout], progress: Progress | None = None) -> list[float]:
        """Return its log-probabilities of completions at temperature 1, end to end."""
        (place,) = self._writer.pool.places
        self._check_reach(rollouts)
        return self._writer.score(rollouts, place, progress)

    def _check_reach(self, rollouts: Sequence[Rollout]) -> None:
        (place,) = self._writer.pool.places
        longest = max(len(one.prompt_ids) + len(one.completion_ids) for one in rollouts)
        if self.reach is not None and longest > self.reach:
            raise ServerError(
                f"{place.described} takes sequences of {place.about.reach} tokens, and one that is to be scored has "
                f"{longest} and one more behind it; start it with a longer context"
            )

    def record(self) -> EngineRecord:
        """Describe itself: what it writes cannot be written again."""
        return EngineRecord(name="server", reproducible=False)

    def metrics(self) -> dict[str, float]:
        """Say nothing: nothing of it changes."""
        return {}

    def close(self) -> None:
        """Ask no more."""
        self._writer.pool.closed = True
