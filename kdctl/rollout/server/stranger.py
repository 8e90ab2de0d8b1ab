"""A server that serves whatever it serves: nobody here has its weights, so it can be asked and not checked.

What is made sure of is that it means the same by tokens as a model that is here, and reads what it is sent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdctl.base.errors import ServerError
from kdctl.base.rng import digest
from kdctl.rollout.sampler import Item, Progress
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.server.gap import slope
from kdctl.rollout.server.pool import Pool
from kdctl.rollout.server.rules import log_probabilities
from kdctl.rollout.server.trust import check_prompt, with_token
from kdctl.rollout.server.writer import Writer
from kdctl.rollout.work import Finished, Until, Work
from kdctl.run.records import EngineRecord, Rollout

FIXED = 8
"""Completions of the model that is here on which the two are compared."""


@dataclass
class Stranger:
    """Has one server complete and score. work: its model is the one that is here, ``settings.url`` the address."""

    work: Work
    blocks_at_once: int = 1

    def __post_init__(self) -> None:
        settings, work = self.work.settings, self.work
        pool = Pool(settings.url, settings.batch_size, settings.timeout_s, work.reporter.note)
        vocabulary = work.model.config.get_text_config().vocab_size
        salt = f"{digest('stranger', *settings.url):x}"
        self._writer = Writer(pool, work.stop, vocabulary, work.source, salt)

    @property
    def described(self) -> str:
        """Say what it is and what it serves."""
        (place,) = self._writer.pool.places
        return f"{place.described}, {place.about.model}"

    def meet(self, known: Sequence[Rollout]) -> None:
        """Find out what the server is, and compare it with the model that is here on completions by that model.

        Raises ServerError where it is away, of no kind that kdctl knows, reads more than it is sent, or means other
        things by tokens: on text of the model that is here it would do better to guess.
        """
        (place,) = self._writer.pool.meet()
        self.work.reporter.note(f"{place.described} serves {place.about.model}")
        self._writer.find_stops(known[0].prompt_ids)
        fixed = list(known[:FIXED])
        here, there = log_probabilities(self.work.model, fixed), torch.tensor(self.score(fixed)).float()
        if -there.mean().item() > math.log(self._writer.vocabulary):
            raise ServerError(
                f"{place.described} gives the tokens of the first model's own text {there.mean():.1f} nats each, less "
                f"than a guess among all {self._writer.vocabulary} would: it means other things by them. Compare "
                "models of one tokenizer"
            )
        own = self.work.model.config.get_text_config().bos_token_id
        others = [None, own] if isinstance(own, int) and own != fixed[0].prompt_ids[0] else [None]
        shifted = [log_probabilities(self.work.model, with_token(fixed, token)) for token in others]
        check_prompt(place, [slope(there, other, here) for other in shifted])

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
        if place.about.reach is not None and longest > place.about.reach:
            raise ServerError(
                f"{place.described} takes sequences of {place.about.reach} tokens, and one that is to be scored has "
                f"{longest}; start it with a longer context"
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
