"""Which rollouts each step trains on: replayed from stores, or generated live into one.

The loop asks for the rows of a step and never knows where they come from. Row r of step t owns slot t·B + r, B rows a
step. A hash of (seed, step, row) decides with probability λ whether the slot is filled on-policy; the slot alone
decides which prompt it takes from a source. Nothing depends on what ran before, so a resumed run, another split into
micro-batches or another number of processes sees the same data.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from transformers import PreTrainedModel

from kdctl.base.errors import StoreError
from kdctl.base.rng import shuffled_index, uniform
from kdctl.config.preset import DistillSection
from kdctl.rollout.mapped import numbers
from kdctl.rollout.sampler import Item
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.store import RolloutStore
from kdctl.rollout.work import RolloutEngine
from kdctl.run.records import Prompt, Rollout, ShardEntry, StoreManifest
from kdctl.system.distributed import ALONE, Processes

LEAVE_S = 30.0
"""Seconds that completions which nobody needs any more are waited for."""


class RolloutSource(Protocol):
    """Where the on-policy rows of a step come from."""

    def prepare(self, step: int) -> None:
        """Make sure that the rows of a step are there. Every process calls it."""
        ...

    def ready(self, step: int) -> bool:
        """Tell whether the rows of a step are there without more work."""
        ...

    def row(self, slot: int) -> Rollout:
        """Return the rollout of a slot. Raises StoreError if there is none."""
        ...

    def resume(self, step: int) -> None:
        """Take up what was there when training was interrupted after ``step`` steps."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return what is worth a line of ``metrics.jsonl`` about where the rows come from."""
        ...

    def close(self) -> None:
        """Let go of what writes them."""
        ...


@dataclass
class Feed:
    """The rows of each step: on-policy where the draw says so, off-policy elsewhere."""

    settings: DistillSection
    off_policy: Sequence[Rollout]
    on_policy: RolloutSource | None = None
    processes: Processes = ALONE

    def rows(self, step: int) -> list[Rollout]:
        """Return the rollouts of one step, in row order, the same in every process."""
        count, settings = self.settings.rows_per_step, self.settings
        if self.on_policy is not None:
            self.on_policy.prepare(step)
        draws = on_policy_rows(settings.seed, step, count, settings.lmbda)
        return [self._row(step * count + row, drawn) for row, drawn in enumerate(draws)]

    def ready(self, step: int) -> bool:
        """Tell whether the rollouts of a step are there without more work."""
        return self.on_policy is None or self.on_policy.ready(step)

    def metrics(self) -> dict[str, float]:
        """Return what is worth a line of ``metrics.jsonl`` about where the rows come from."""
        return {} if self.on_policy is None else self.on_policy.metrics()

    def close(self) -> None:
        """Let go of what writes rollouts."""
        if self.on_policy is not None:
            self.on_policy.close()

    def _row(self, slot: int, drawn: bool) -> Rollout:
        if drawn and self.on_policy is not None:
            return self.on_policy.row(slot)
        index = slot_index(slot, len(self.off_policy), self.settings.seed, "off_policy")
        return self.off_policy[index]


class Stored:
    """A source whose rows are all there before training starts."""

    def prepare(self, step: int) -> None:
        """Do nothing."""

    def ready(self, step: int) -> bool:
        """Say yes."""
        return True

    def resume(self, step: int) -> None:
        """Do nothing."""

    def metrics(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """Do nothing."""


@dataclass
class Replay(Stored):
    """Student rollouts from a finished store, in reshuffled passes."""

    rollouts: Sequence[Rollout]
    seed: int

    def row(self, slot: int) -> Rollout:
        """Return the rollout of a slot."""
        return self.rollouts[slot_index(slot, len(self.rollouts), self.seed, "on_policy")]


@dataclass
class ReplayedVariant(Stored):
    """The rollouts that another variant generated live, each in the slot that it filled there."""

    rollouts: Sequence[Rollout]
    name: str

    def __post_init__(self) -> None:
        slots = numbers(self.rollouts, "sample_index")
        self._places = np.argsort(slots)
        self._slots = slots[self._places]

    def row(self, slot: int) -> Rollout:
        """Return the rollout of a slot. Raises StoreError if that variant generated none for it."""
        place = int(np.searchsorted(self._slots, slot))
        if place == len(self._slots) or self._slots[place] != slot:
            raise StoreError(
                f"variant {self.name} generated no rollout for slot {slot}; replay it with its own distill.lmbda, "
                "seed and batch size and no more than its steps"
            )
        return self.rollouts[int(self._places[place])]


@dataclass
class Live:
    """Student rollouts generated every ``refresh_every`` steps into a store of the same kind.

    One refresh writes the rows that the next steps will draw, as one shard, before the first of them is used. The
    sample index of a rollout is the slot that it fills. Several processes divide the generation.
    """

    settings: DistillSection
    prompts: Sequence[Prompt]
    student: PreTrainedModel
    engine: RolloutEngine
    sampling: Sampling
    store: RolloutStore
    identity: str
    writer: str
    processes: Processes = ALONE
    lag: int = 0
    """1: the next interval is written while this one is trained on, by the student as it is now."""
    keep: Callable[[ShardEntry, Sequence[Rollout]], None] | None = None
    """Told of each shard before it is trained on, to keep the teacher's states of it."""
    progress: Callable[[int], None] | None = None
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    """Makes a divided student whole while this process's engine writes with it."""
    _interval: int = -1
    _ahead: "Ahead | None" = None
    _loaded: int = -1
    _rows: dict[int, Rollout] = field(default_factory=dict)
    _shards: list[ShardEntry] = field(default_factory=list)
    _steps: dict[str, tuple[int, int]] = field(default_factory=dict)

    def ready(self, step: int) -> bool:
        """Tell whether a step belongs to the current interval."""
        return step // self.settings.refresh_every == self._interval

    def row(self, slot: int) -> Rollout:
        """Return the rollout of a slot of the current interval."""
        return self._rows[slot]

    def metrics(self) -> dict[str, float]:
        """Return what the engine found about the last weights."""
        return self.engine.metrics()

    def close(self) -> None:
        """End what the engine started, and wait a while for what it is at."""
        self.engine.close()
        if self._ahead is not None:
            self._ahead.wait(LEAVE_S)

    def prepare(self, step: int) -> None:
        """Make sure that the rollouts of a step's interval are there."""
        interval = step // self.settings.refresh_every
        if interval == self._interval:
            return
        if step != self._first(interval):
            self.processes.passing(lambda: self._reload(interval))
        elif not self._keep_written(interval):
            self._write(interval)
        self._interval = interval

    def resume(self, step: int) -> None:
        """Take up the shards of the intervals that were begun before ``step``."""
        for interval in range(-(-step // self.settings.refresh_every)):
            if not self._slots(interval):
                continue
            entry = self._kept(interval)
            if entry is None:
                raise StoreError(
                    f"{self.store.shard_path(interval)} is missing or damaged, and the checkpoint at step {step} was "
                    "trained on it; --force starts the variant again"
                )
            self._note(interval, entry)

    def _first(self, interval: int) -> int:
        return interval * self.settings.refresh_every

    def _last(self, interval: int) -> int:
        return min(self._first(interval + 1), self.settings.steps) - 1

    def _slots(self, interval: int) -> list[int]:
        """List the slots of an interval that the λ draw gives to the student."""
        settings, count = self.settings, self.settings.rows_per_step
        return [
            step * count + row
            for step in range(self._first(interval), self._last(interval) + 1)
            for row, drawn in enumerate(on_policy_rows(settings.seed, step, count, settings.lmbda))
            if drawn
        ]

    def _items(self, interval: int) -> list[Item]:
        """List the prompts of an interval's slots, each with its slot."""
        count, seed = len(self.prompts), self.settings.seed
        return [(self.prompts[slot_index(slot, count, seed, "live")], slot) for slot in self._slots(interval)]

    def _kept(self, interval: int) -> ShardEntry | None:
        """Return the entry of an interval's shard, if it is whole."""
        places = [(prompt.index, slot) for prompt, slot in self._items(interval)]
        return self.store.kept_shard(interval, self.identity, places)

    def _keep_written(self, interval: int) -> bool:
        """Take up a shard that was written before an interruption, where the engine would write another one."""
        if self.engine.record().reproducible or self._ahead is not None:
            return False
        entry = self.processes.on_main(lambda: self._kept(interval) if self._slots(interval) else None)
        if entry is not None:
            self._note(interval, entry)
            self.processes.on_main(lambda: self.store.describe(self._manifest()))
            self.processes.passing(lambda: self._take(entry, self.store.read_shard(entry)))
        return entry is not None

    def _write(self, interval: int) -> None:
        items, processes = self._items(interval), self.processes
        if items:
            rollouts = self._generated(interval, items)
            entry = processes.on_main(lambda: self.store.write_shard(interval, rollouts, self.identity))
            self._note(interval, entry)
            processes.passing(lambda: self._take(entry, rollouts))
        processes.on_main(lambda: self.store.finish(self._manifest()))
        if self.lag:
            self._begin(interval + 1, self._first(interval))

    def _generated(self, interval: int, items: Sequence[Item]) -> list[Rollout]:
        """Return the completions of an interval, divided among the processes, which may have been begun before."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return self.processes.merge(ahead.result())
        step = self._first(interval)
        with self.whole():
            self._load(step)
            return self.processes.merge(self._complete(items, step))

    def _begin(self, interval: int, step: int) -> None:
        """Begin to write an interval with the student as it is after ``step`` steps, and go on without waiting."""
        if self._first(interval) < self.settings.steps and (items := self._items(interval)):
            self._load(step)
            self._ahead = Ahead(lambda: self._complete(items, step))

    def _load(self, step: int) -> None:
        """Have the engine take up the student as it is now, unless it did."""
        if self._loaded != step:
            self.engine.load(self.student, step)
            self._loaded = step

    def _complete(self, items: Sequence[Item], step: int) -> list[Rollout]:
        mine = self.processes.share(items)
        return self.engine.complete(mine, self.sampling, step, self.progress) if mine else []

    def _reload(self, interval: int) -> None:
        entry = self._kept(interval) if self._slots(interval) else None
        if entry is not None:
            self._take(entry, self.store.read_shard(entry))

    def _take(self, entry: ShardEntry, rollouts: Sequence[Rollout]) -> None:
        self._rows = {rollout.sample_index: rollout for rollout in rollouts}
        if self.keep is not None:
            self.keep(entry, rollouts)

    def _note(self, interval: int, entry: ShardEntry) -> None:
        first = sum(shard.rows for shard in self._shards)
        self._shards.append(entry)
        self._steps[f"{self._first(interval)}-{self._last(interval)}"] = (first, first + entry.rows)

    def _manifest(self) -> StoreManifest:
        return StoreManifest(
            source="student",
            identity=self.identity,
            writer=self.writer,
            sampling=self.sampling.record(),
            shards=tuple(self._shards),
            steps=dict(self._steps),
            engine=self.engine.record(),
        )


class Ahead:
    """Work that a thread does meanwhile; the process may end without it."""

    def __init__(self, work: Callable[[], list[Rollout]]):
        self._found: list[Rollout] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._do, args=(work,), daemon=True)
        self._thread.start()

    def _do(self, work: Callable[[], list[Rollout]]) -> None:
        try:
            self._found = work()
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._error = error

    def wait(self, seconds: float) -> None:
        """Wait for the end, some seconds at most, whatever comes of it."""
        self._thread.join(seconds)

    def result(self) -> list[Rollout]:
        """Wait for the end and return what was made. Raises what the work raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found


def on_policy_rows(seed: int, step: int, rows: int, lmbda: float) -> list[bool]:
    """Draw which rows of a step are student-generated: row r where uniform(seed, step, r) < λ."""
    return [uniform("lambda", seed, step, row) < lmbda for row in range(rows)]


def slot_index(slot: int, count: int, seed: int, source: str) -> int:
    """Return which of a source's ``count`` items fills a slot: reshuffled passes over all of them."""
    return shuffled_index(slot, count, "order", seed, source)
