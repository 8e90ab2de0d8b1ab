"""Completions from servers, each of them checked: what comes back means the same as what is drawn in this process."""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from kdctl.base.errors import ServerError
from kdctl.base.rng import digest
from kdctl.rollout.sampler import Item, Progress
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.server.client import Client, Refused
from kdctl.rollout.server.pool import Place, Pool
from kdctl.rollout.server.protocol import Draw, Drawn, Malformed
from kdctl.rollout.work import Finished, Work
from kdctl.run.records import Prompt, Rollout

T = TypeVar("T")
SEEDS = 2**31
"""Seeds that every server takes."""


@dataclass
class Writer:
    """Has servers draw completions. stop: the tokens that end one; vocabulary: tokens that there are.

    salt: names the weights behind what is computed, so that none of it is used for others.
    """

    pool: Pool
    stop: tuple[int, ...]
    vocabulary: int
    source: str
    salt: str = ""
    stops_kept: dict[str, bool] = field(default_factory=dict)
    """Whether a server's completions hold the token that ended them, by address."""

    @classmethod
    def of(cls, work: Work) -> "Writer":
        """Make what has the servers of a work's settings draw for it."""
        settings, vocabulary = work.settings, work.model.config.get_text_config().vocab_size
        pool = Pool(settings.url, settings.batch_size, settings.timeout_s, work.reporter.note)
        return cls(pool, work.stop, vocabulary, work.source, work.name)

    def draw(
        self,
        items: Sequence[Item],
        sampling: Sampling,
        policy_step: int,
        progress: Progress | None = None,
        finished: Finished | None = None,
        only: Place | None = None,
    ) -> list[Rollout]:
        """Draw a completion for each (prompt, sample index), in order.

        progress, finished: told of tokens, and of an item's place and its completion, as they come; only: the server
        that is to draw all of them.
        """
        self.check_reach([prompt for prompt, _ in items], sampling)

        def tell(place: int, rollout: Rollout) -> None:
            if progress is not None:
                progress(len(rollout.completion_ids))
            if finished is not None:
                finished(place, rollout)

        return self.pool.run(
            items, lambda client, place, item: self._one(client, place, item, sampling, policy_step), tell, only
        )

    def score(self, rollouts: Sequence[Rollout], only: Place, progress: Progress | None = None) -> list[float]:
        """Return a server's log-probabilities of completions, end to end; progress: told of tokens as they come."""

        async def scored(client: Client, place: Place, one: Rollout) -> list[float]:
            return await answered(place, lambda: place.server.score(client, one.prompt_ids, one.completion_ids))

        def tell(_: int, values: Sequence[float]) -> None:
            if progress is not None:
                progress(len(values))

        found = [value for part in self.pool.run(rollouts, scored, tell, only) for value in part]
        _check_finite(only, found, "of tokens that were sent")
        return found

    def find_stops(self, prompt_ids: Sequence[int]) -> None:
        """Find out, by forcing one, whether a completion holds the token that ended it."""

        async def forced(client: Client, place: Place, stop: int) -> Drawn:
            draw = replace(self.request(prompt_ids, Sampling(1.0, 1.0, 0, 2, 0, 0), 0), forced=stop)
            return await answered(place, lambda: place.server.draw(client, draw))

        def found(place: Place) -> bool:
            (drawn,) = self.pool.run(self.stop[:1], forced, only=place)
            return self._kept(place, drawn)

        if self.stop:
            self.stops_kept |= self.pool.each(found)

    def _kept(self, place: Place, drawn: Drawn) -> bool:
        """Read the answer of a server that was made to draw the first stop token."""
        stop, *others = self.stop
        if drawn.ids[:1] == [stop]:
            return True
        if drawn.ids or not drawn.ended:
            raise ServerError(
                f"{place.described} draws {drawn.ids} where a bias of its logit forces token {stop}: it does not take "
                "logit_bias, or another program changes requests on their way"
            )
        if others:
            raise ServerError(
                f"{place.described} leaves out the token that ends a completion, and this model has "
                f"{len(self.stop)} of them ({', '.join(map(str, self.stop))}), so it cannot be told which it was; "
                f"{place.server.ids_advice}"
            )
        return False

    def request(self, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> Draw:
        """Say what is asked of a server."""
        return Draw(
            prompt_ids,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_new_tokens,
            sampling.max_new_tokens,
            self.stop,
            seed,
            self.salt,
        )

    def check_reach(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raise ServerError if a sequence can become longer than a server takes."""
        longest = max((len(prompt.prompt_ids) for prompt in prompts), default=0) + sampling.max_new_tokens
        for place in self.pool.places:
            if place.about.reach is not None and longest > place.about.reach:
                raise ServerError(
                    f"{place.described} takes sequences of {place.about.reach} tokens, and a prompt with "
                    f"rollout.max_new_tokens={sampling.max_new_tokens} can have {longest}; start it with a longer "
                    "context"
                )

    async def _one(self, client: Client, place: Place, item: Item, sampling: Sampling, policy_step: int) -> Rollout:
        """Draw one completion and check everything about it."""
        prompt, sample = item
        seed = digest("server", sampling.seed, policy_step, prompt.id, sample) % SEEDS
        draw = self.request(prompt.prompt_ids, sampling, seed)
        drawn = await answered(place, lambda: place.server.draw(client, draw))
        ids, logprobs = self._ended(place, draw, drawn)
        if len(logprobs) < len(ids) or None in logprobs:
            logprobs = await answered(place, lambda: place.server.score(client, draw.prompt_ids, ids))
        _check_finite(place, logprobs, "of what it drew itself")
        return Rollout(
            prompt_id=prompt.id,
            prompt_index=prompt.index,
            sample_index=sample,
            prompt_ids=prompt.prompt_ids,
            completion_ids=ids,
            logprobs=[value for value in logprobs if value is not None],
            finish_reason="stop" if ids and ids[-1] in self.stop else "length",
            policy_step=policy_step,
            seed=sampling.seed,
            source=self.source,
        )

    def _ended(self, place: Place, draw: Draw, drawn: Drawn) -> tuple[list[int], list[float | None]]:
        """Return tokens and log-probabilities as the in-process engine has them: a stop token is the last.

        Raises ServerError where another prompt was read, more was written than asked for, or it stopped elsewhere.
        """
        _check_counts(place, draw, drawn, self.vocabulary)
        ids, logprobs = drawn.ids, drawn.logprobs
        end = next((number for number, token in enumerate(ids) if token in self.stop), None)
        if end is not None and end < draw.min_new_tokens:
            raise ServerError(
                f"{place.described} ended a completion after {end + 1} tokens, and it was asked not to before "
                f"rollout.min_new_tokens={draw.min_new_tokens}; it does not take that field"
            )
        if end is not None:
            return ids[: end + 1], logprobs[: end + 1]
        if len(ids) == draw.max_new_tokens:
            return ids, logprobs
        if drawn.ended and self.stop and not self.stops_kept.get(place.url, True):
            return [*ids, self.stop[0]], [*logprobs, None]
        raise ServerError(
            f"{place.described} ended a completion after {len(ids)} tokens of {draw.max_new_tokens}, at "
            f"{ids[-1] if ids else 'none'}, and this model's end at {', '.join(map(str, self.stop)) or 'no token'}; it "
            "stops at tokens or texts of its own, or has no room for a longer one"
        )


def _check_counts(place: Place, draw: Draw, drawn: Drawn, vocabulary: int) -> None:
    """Raise ServerError where the numbers of an answer do not fit the request."""
    ids = drawn.ids
    if drawn.prompt_tokens != len(draw.prompt_ids):
        raise ServerError(
            f"{place.described} read {drawn.prompt_tokens} prompt tokens and {len(draw.prompt_ids)} were sent: it adds "
            "some of its own, as a second beginning of sequence; switch that off there"
        )
    if len(drawn.logprobs) not in (len(ids), 0):
        raise ServerError(
            f"{place.described} states {len(drawn.logprobs)} log-probabilities of {len(ids)} tokens; "
            f"{place.server.ids_advice}"
        )
    if len(ids) > draw.max_new_tokens or not all(0 <= token < vocabulary for token in ids):
        raise ServerError(
            f"{place.described} answers with {len(ids)} tokens up to {max(ids, default=0)}, and {draw.max_new_tokens} "
            f"below {vocabulary} are the most; it serves another model, or another program changes requests"
        )


def _check_finite(place: Place, logprobs: Sequence[Any], whose: str) -> None:
    if not all(math.isfinite(value) for value in logprobs):
        raise ServerError(
            f"{place.described} states log-probabilities that are no numbers ({str(logprobs[:3])[1:-1]} …) {whose}; "
            "its weights are damaged or overflow"
        )


async def answered(place: Place, ask: Callable[[], Awaitable[T]]) -> T:
    """Have a server asked; make what it refuses and what it answers wrongly an error that says what to do."""
    try:
        return await ask()
    except Refused as error:
        raise ServerError(f"{place.described} refuses a request ({error})") from None
    except Malformed as error:
        raise ServerError(f"{place.described}: {error}; {place.server.ids_advice}") from None
