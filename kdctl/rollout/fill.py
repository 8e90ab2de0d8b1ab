"""Filling a rollout store block by block."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

from kdctl.base.errors import StoreError
from kdctl.base.progress import Reporter
from kdctl.data.prompts import PromptSet
from kdctl.rollout.sampler import Item
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.store import RolloutStore
from kdctl.rollout.work import RolloutEngine
from kdctl.run.record_files import damaged
from kdctl.run.records import EngineRecord, Prompt, Rollout, ShardEntry, StoreManifest
from kdctl.system.distributed import ALONE, Processes


@dataclass(frozen=True)
class Plan:
    """What a store will hold. writer: fingerprint of the model or data set behind the completions.

    whose: what progress calls the completions where the store's own name does not tell.
    """

    source: str
    identity: str
    writer: str
    prompts: PromptSet
    prompts_per_block: int
    num_generations: int = 1
    whose: str = ""

    def blocks(self) -> "Blocks":
        """Cut (prompt, sample index) pairs into blocks of whole prompts."""
        return Blocks(self.prompts.prompts, self.prompts_per_block, self.num_generations)

    def manifest(
        self, shards: Sequence[ShardEntry], sampling: Sampling | None = None, engine: RolloutEngine | None = None
    ) -> StoreManifest:
        """Describe the finished store; nobody sampled what a data set brought."""
        return StoreManifest(
            source=self.source,
            identity=self.identity,
            writer=self.writer,
            sampling=sampling.record() if sampling else None,
            engine=engine.record() if engine else EngineRecord(),
            shards=tuple(shards),
            skipped_prompts=self.prompts.skipped,
        )


@dataclass(frozen=True)
class Blocks(Sequence[list[Item]]):
    """Blocks of a store's (prompt, sample index) pairs, each put together when it is asked for."""

    prompts: Sequence[Prompt]
    prompts_per_block: int
    num_generations: int

    def __len__(self) -> int:
        """Count the blocks."""
        return -(-len(self.prompts) // self.prompts_per_block)

    @overload
    def __getitem__(self, index: int) -> list[Item]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Item]]: ...

    def __getitem__(self, index: int | slice) -> list[Item] | list[list[Item]]:
        """Return a block, or some."""
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        return [(prompt, sample) for prompt in self._of(index) for sample in range(self.num_generations)]

    def rows(self, index: int) -> int:
        """Count the pairs of a block."""
        return len(self._of(index)) * self.num_generations

    def _of(self, index: int) -> Sequence[Prompt]:
        first = range(len(self))[index] * self.prompts_per_block
        return self.prompts[first : first + self.prompts_per_block]


def usable(store: RolloutStore, identity: str, asked: Mapping[str, Any] | None = None) -> bool:
    """Tell whether a store is finished. Raises StoreError if it was made from other settings or inputs.

    asked: settings of sampling by their dotted keys, to name those that differ.
    """
    if not store.manifest_path.exists():
        return False
    manifest = store.manifest()
    if not manifest.shards:
        raise damaged(store.manifest_path, "it names no shards")
    if manifest.identity == identity:
        return True
    held = f"{manifest.rows} data-set completions"
    if manifest.sampling is not None:
        made = manifest.sampling.model_dump()
        settings = ", ".join(f"{key}={value}" for key, value in made.items())
        held = f"{manifest.rows} completions sampled with {settings}"
        pairs = {key: (made.get(key.rpartition(".")[2], value), value) for key, value in (asked or {}).items()}
        changed = [f"{key} is now {new}" for key, (old, new) in pairs.items() if old != new]
        held += f", and {', '.join(changed)}" if changed else ""
    rewrite = f"rewrite it with kdctl rollout --source {manifest.source} --force"
    if manifest.source == "heldout":
        rewrite = "delete it together with everything that was measured on it"
    raise StoreError(
        f"{store.path} was made with other settings or from another model or other prompts than asked for now: it "
        f"holds {held}. Training or measuring on it would not be what the preset says; {rewrite}, or "
        "use another --run"
    )


def fill(
    store: RolloutStore,
    plan: Plan,
    engine: RolloutEngine,
    sampling: Sampling,
    reporter: Reporter,
    processes: Processes = ALONE,
) -> StoreManifest:
    """Generate a store block by block, keeping whole blocks of an earlier attempt; the manifest comes last.

    Blocks are divided among processes. Each is generated as it would be by one, so the store is the same.
    """
    processes.on_main(store.reopen)
    longest = sampling.max_new_tokens
    blocks = plan.blocks()
    mine = processes.share(range(len(blocks)))
    found = {index: store.kept_shard(index, plan.identity, _places(blocks[index])) for index in mine}
    missing = [index for index in mine if found[index] is None]
    total = sum(map(blocks.rows, mine)) * longest
    done = total - sum(map(blocks.rows, missing)) * longest
    with reporter.task(f"generating {plan.whose or store.path.name} completions", "tokens") as advance:
        for first in range(0, len(missing), engine.blocks_at_once):
            some = [(index, blocks[index]) for index in missing[first : first + engine.blocks_at_once]]
            written = _Written(store, plan.identity, some)
            items, drawn = [item for _, block in some for item in block], _Counter(done, total, advance)
            written.rest(engine.complete(items, sampling, progress=drawn, finished=written.take))
            found |= written.entries
            done += len(items) * longest
            advance(done, total)
    shards = [entry for entry in found.values() if entry is not None]
    manifest = plan.manifest(processes.merge(shards), sampling, engine)
    processes.on_main(lambda: store.finish(manifest))
    return manifest


def _places(block: Sequence[Item]) -> list[tuple[int, int]]:
    return [(prompt.index, sample) for prompt, sample in block]


class _Written:
    """Writes blocks that are completed together, each as soon as its last row is there."""

    def __init__(self, store: RolloutStore, identity: str, blocks: Sequence[tuple[int, list[Item]]]):
        self.store, self.identity = store, identity
        self.entries: dict[int, ShardEntry] = {}
        self._rows: dict[int, list[Rollout | None]] = {index: [None] * len(block) for index, block in blocks}
        self._owner = [(index, row) for index, block in blocks for row in range(len(block))]

    def take(self, place: int, rollout: Rollout) -> None:
        """Take up the completion of an item; the last one of a block has it written."""
        index, row = self._owner[place]
        rows = self._rows[index]
        rows[row] = rollout
        whole = [one for one in rows if one is not None]
        if len(whole) == len(rows):
            self.entries[index] = self.store.write_shard(index, whole, self.identity)

    def rest(self, rollouts: Sequence[Rollout]) -> None:
        """Take up what an engine returned and did not tell of before."""
        for place, rollout in enumerate(rollouts):
            if self._owner[place][0] not in self.entries:
                self.take(place, rollout)


class _Counter:
    """Counts tokens within a block for the progress bar."""

    def __init__(self, done: int, total: int, advance):
        self.done, self.total, self.advance = done, total, advance

    def __call__(self, rows: int) -> None:
        self.done += rows
        self.advance(self.done, self.total)


def fill_from_dataset(store: RolloutStore, plan: Plan, rollouts: Iterable[Rollout]) -> StoreManifest:
    """Write completions that a data set brought, a block at a time."""
    store.reopen()
    found, shards = iter(rollouts), []
    while block := list(islice(found, plan.prompts_per_block)):
        shards.append(store.write_shard(len(shards), block, plan.identity))
    manifest = plan.manifest(shards)
    store.finish(manifest)
    return manifest
