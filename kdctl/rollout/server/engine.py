"""The rollout engine that has servers write completions, and takes from them nothing that it did not check.

Before the first completion: what the server is, where a completion's last token is, by which rule it draws, and whether
it holds these weights. After every refresh: whether it holds the new ones.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.base.errors import ServerError
from kdctl.config.preset import Form
from kdctl.rollout.sampler import Item, Progress
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.server.child import START_S, Child
from kdctl.rollout.server.client import Client, Refused
from kdctl.rollout.server.gap import Gap, gap, slope
from kdctl.rollout.server.pool import Place
from kdctl.rollout.server.protocol import Malformed
from kdctl.rollout.server.refresh import run_command
from kdctl.rollout.server.rules import USUAL, Rule, asked_rule, log_probabilities, read, rules_of
from kdctl.rollout.server.trust import check_gap, check_prompt, check_rule, first_tokens, with_token
from kdctl.rollout.server.writer import Writer
from kdctl.rollout.work import Finished, Until, WeightFiles, Work
from kdctl.run.records import EngineRecord, Rollout, ServerRecord

NAME = "server"
FIXED = 8
"""Sequences on which a server's log-probabilities are compared with those computed here."""
TOKENS = 64
"""Longest completion of them; they are drawn by the server, which shows how it draws."""


@dataclass
class Served:
    """Has servers write completions."""

    work: Work
    blocks_at_once: int = 16
    """Enough that the requests at hand rarely run out, and few enough to be in memory."""
    _child: Child | None = None
    _looked: dict[str, list[Rollout]] = field(default_factory=dict)
    """What each server drew at first, by address."""
    _before: Tensor | None = None
    _gap: Gap | None = None
    _refresh_s: float | None = None
    """Of the last refresh: writing the weights, having them loaded, and making sure of it."""

    def __post_init__(self) -> None:
        self._writer = Writer.of(self.work)
        self._pool = self._writer.pool

    def load(self, model: PreTrainedModel, policy_step: int) -> None:
        """Have every server hold a model's weights, and make sure that it does. Every process calls.

        Raises ServerError for a server that does not, or that does not do what the protocol says.
        """
        started, first = time.perf_counter(), not self._looked
        with self._said_in_log():
            self._load(model, policy_step)
        self._refresh_s = None if first else time.perf_counter() - started

    def _load(self, model: PreTrainedModel, policy_step: int) -> None:
        first = not self._looked
        if first:
            self._share(self._meet)
        if policy_step or not first:
            self._refresh(policy_step)
        elif self._files.trained and self._child is None:
            self._refresh(0, self._try_reload)  # another training may have left its weights there
        if first:
            self._looked = self.work.processes.on_main(self._look)
        self._check(model, policy_step)
        if first:
            self._check_rule(model)

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
        with self._said_in_log():
            return self._writer.draw(items, sampling, policy_step, progress, finished)

    @contextmanager
    def _said_in_log(self) -> Iterator[None]:
        """Say of an error where the server that was started for this may say more."""
        try:
            yield
        except ServerError as error:
            log = str(self._files.log)
            if self._child is None or log in str(error):
                raise
            raise ServerError(f"{error}. What the server printed is in {log}") from None

    def record(self) -> EngineRecord:
        """Describe what wrote, for a manifest."""
        if not self._pool.places or self._gap is None:
            return EngineRecord(name=NAME, reproducible=False)
        place = self._pool.places[0]
        request = place.server.fields(self._writer.request([], Sampling.of(self.work.settings), 0))
        server = ServerRecord(
            kind=place.server.kind,
            version=place.about.version,
            model=place.about.model,
            servers=len(self._pool.urls),
            request={name: value for name, value in request.items() if name != "seed"},
            gap=self._gap.mean,
        )
        return EngineRecord(name=NAME, reproducible=False, server=server)

    def metrics(self) -> dict[str, float]:
        """Return the gap of the last weights, and the seconds that taking them up took."""
        found = {"rollout/server_gap": None if self._gap is None else self._gap.mean}
        found["rollout/refresh_s"] = self._refresh_s
        return {name: value for name, value in found.items() if value is not None}

    def close(self) -> None:
        """End the server that was started for this."""
        self._pool.closed = True
        if self._child is not None:
            self._child.stop()
            self._child = None

    @property
    def _files(self) -> WeightFiles:
        if self.work.files is None:
            raise ServerError("a server has its weights from files, and there are none here; use another engine")
        return self.work.files

    def _share(self, find: Callable[[], None]) -> None:
        """Do in the main process what finds out about servers, and tell the others."""

        def found() -> tuple[list[Place], dict[str, bool]]:
            find()
            return self._pool.places, self._writer.stops_kept

        self._pool.places, self._writer.stops_kept = self.work.processes.on_main(found)

    # Before the first completion.

    def _meet(self) -> None:
        """Start the server where that is asked for; find out what each is and where its completions end."""
        settings, reporter = self.work.settings, self.work.reporter
        if settings.serve is not None:
            self._child = Child(settings.serve, self._files.log, reporter)
            self._pool.urls = [self._child.start(self._files.start(settings.weights or self._child.form))]
        for place in self._pool.meet():
            reporter.note(f"{place.described} serves {place.about.model}")
            if settings.min_new_tokens and not place.server.masks_stop:
                raise ServerError(
                    f"{place.described} cannot keep a completion from ending before rollout.min_new_tokens="
                    f"{settings.min_new_tokens}; set it to 0, or use another server"
                )
        self._writer.check_reach(self.work.prompts, Sampling.of(settings))
        self._writer.find_stops(self.work.prompts[0].prompt_ids)

    @property
    def _short(self) -> Sampling:
        """Return how completions that are looked at are drawn: like all others, and no longer than need be."""
        found = Sampling.of(self.work.settings)
        longest = min(TOKENS, found.max_new_tokens)
        return replace(found, max_new_tokens=longest, min_new_tokens=min(longest, found.min_new_tokens))

    def _look(self) -> dict[str, list[Rollout]]:
        """Have every server draw a few completions as the work itself will, each its own."""
        prompts = self.work.prompts[:FIXED]
        items = [(prompt, sample) for sample in range(-(-FIXED // len(prompts))) for prompt in prompts]
        numbers = {place.url: -1 - number for number, place in enumerate(self._pool.places)}

        def drawn(place: Place) -> list[Rollout]:
            found = self._writer.draw(items, self._short, numbers[place.url], only=place)
            return [rollout for rollout in found if rollout.completion_ids]

        return self._pool.each(drawn)

    def _check_rule(self, model: PreTrainedModel) -> None:
        """Check how each server draws."""
        rules, rule = (Rule(), *USUAL, *rules_of(self._files.start("packed"))), asked_rule(self._short)
        places = {place.url: place for place in self._pool.places}
        for url, looked in self._looked.items():  # of every one, since each process computes its part
            found = read(model, looked, self._short, rules, self.work.stop)
            if self.work.processes.is_main and url in places:
                check_rule(places[url], looked, found, rule)

    # Whenever weights change.

    def _refresh(self, policy_step: int, reload: Callable[[Path], None] | None = None) -> None:
        """Give every server the model's weights as they are now."""
        reload = reload or self._reload
        self._writer.salt = f"{self.work.name}-{policy_step}"
        weights = self._files.write(self._form(), policy_step)  # each process has a part of them
        self._share(lambda: reload(weights))
        self._files.clear(policy_step)

    def _form(self) -> Form:
        """Return how the servers take weights. Raises ServerError where they differ in that."""
        asked = self.work.settings.weights
        forms: set[Form] = {asked} if asked else {place.server.form for place in self._pool.places}
        if len(forms) > 1:
            kinds = ", ".join(sorted({place.server.kind for place in self._pool.places}))
            raise ServerError(
                f"{kinds} take weights in different files, and a refresh writes one for all; give rollout.url servers "
                "of one kind, or set rollout.weights to what all of them take"
            )
        return forms.pop()

    def _try_reload(self, weights: Path) -> None:
        """Have servers load the first weights; those that cannot must hold them already."""
        try:
            self._reload(weights)
        except ServerError as error:
            self.work.reporter.note(f"warning: {error}. It must hold what it was started with")

    def _reload(self, weights: Path) -> None:
        """Have servers load new weights, or start again with them where they cannot."""
        if self.work.settings.restart is not None:
            run_command(self.work.settings.restart, weights, self.work.reporter)
            self._pool.meet(START_S)
            return
        try:
            self._pool.each(lambda place: self._reload_one(place, weights))
        except ServerError:
            if self._child is None:
                raise
            self._pool.urls = [self._child.restart(weights)]
            self._pool.meet()
            self._writer.find_stops(self.work.prompts[0].prompt_ids)

    def _reload_one(self, place: Place, weights: Path) -> None:
        async def reloaded(client: Client, place: Place, folder: Path) -> None:
            await place.server.reload(client, folder)

        try:
            self._pool.run([weights], reloaded, only=place)
        except (Refused, Malformed) as error:
            raise ServerError(
                f"{place.described} does not take new weights ({error}); {place.server.reload_advice}"
            ) from None

    def _check(self, model: PreTrainedModel, policy_step: int) -> None:
        """Compare every server's log-probabilities of fixed tokens with the model's; keep the largest gap."""
        fixed = next(iter(self._looked.values()))[:FIXED]
        here = log_probabilities(model, fixed)  # every process computes its part where models are divided
        shifted = [log_probabilities(model, with_token(fixed, token)) for token in self._first_tokens(model)]

        def compared() -> Gap:
            folder = str(self._files.start("packed"))

            def of(place: Place) -> Gap:
                there = torch.tensor(self._writer.score(fixed, place))
                check_prompt(place, [slope(there, other, here) for other in shifted])
                found = gap(there, here, self._before)
                check_gap(place, found, policy_step, folder)
                return found

            return max(self._pool.each(of).values(), key=lambda one: one.mean)

        self._gap, self._before = self.work.processes.on_main(compared), here

    def _first_tokens(self, model: PreTrainedModel) -> list[int | None]:
        """List what a server may have put before the prompts of the first look."""
        if self._before is not None:
            return []  # it would have done so from the start
        return first_tokens(model.config, self.work.prompts[0].prompt_ids)
