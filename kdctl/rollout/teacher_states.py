"""The teacher's final hidden states beside a rollout store, so that later training needs no pass of the teacher.

H numbers a token instead of V logits: the output head is shared and frozen, so every divergence is recomputed exactly
from them. One safetensors file a shard, read through a memory map; it names the shard and the teacher that it is of and
is written again where either has changed. ``int8`` takes about half: rounded to nearest, with a scale for every 32
numbers, since a few of a token's are ten times as large as the others.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.base.errors import StoreError
from kdctl.base.progress import Reporter
from kdctl.model.batch import collate, predicting_states, split
from kdctl.rollout.mapped import MappedRollouts, Places
from kdctl.rollout.store import RolloutStore
from kdctl.run.files import atomic_path
from kdctl.run.hashes import known_files
from kdctl.run.names import inside
from kdctl.run.paths import require_free_space
from kdctl.run.records import Rollout, ShardEntry
from kdctl.system.distributed import ALONE, Processes, is_divided

Kind = Literal["exact", "int8"]
Part = tuple[ShardEntry, Sequence[Rollout]]
BATCH = 16
GROUP = 32
MADE_OF = "made_of"
"""The one key of a file's metadata: safetensors writes several in an order that differs from process to process."""
SMALLEST = 2.0**-24
"""The smallest positive half-precision number."""


@dataclass
class TeacherStates:
    """Stored states of several stores, found by rollout.

    teacher: fingerprint of the model that they are of.
    """

    teacher: str
    kind: Kind = "exact"
    _places: dict[Path, list[Places]] = field(default_factory=dict)

    def fill(
        self, store: RolloutStore, model: PreTrainedModel, reporter: Reporter, processes: Processes = ALONE
    ) -> None:
        """Take up a finished store, running the teacher over the shards whose states are not there.

        Processes share these; where they divide the teacher, they run it together.
        """
        rollouts, shards = store.read(), store.manifest().shards
        parts = [(one, rollouts[end - one.rows : end]) for one, end in zip(shards, rollouts.shards.ends, strict=True)]
        divided = is_divided(model)
        mine = parts if divided else processes.share(parts)
        missing = [one for one in shards if not states_path(store.path / one.file).exists()]
        need = sum(one.completion_tokens for one in missing) * model.config.hidden_size * model.dtype.itemsize
        require_free_space(store.path, need, f"keeping the teacher's states of {store.path.name}")
        with reporter.task(f"teacher reads {store.path.name} completions", "shards") as advance:
            for done, _ in enumerate(self._made(store, mine, model, processes if divided else ALONE)):
                advance(done + 1, len(mine))
        processes.wait()
        if not divided:
            for _ in self._made(
                store, [p for i, p in enumerate(parts) if i % processes.count != processes.rank], model
            ):
                pass
        self._take(store, rollouts)

    def add(
        self,
        store: RolloutStore,
        shard: ShardEntry,
        rollouts: Sequence[Rollout],
        model: PreTrainedModel,
        processes: Processes = ALONE,
    ) -> None:
        """Take up one shard, running the teacher over it where its states are not there.

        Those of the shard before it in the same store stay, earlier ones are found no more. processes: where they
        divide the teacher, all call.
        """
        for _ in self._made(store, [(shard, rollouts)], model, processes if is_divided(model) else ALONE):
            pass
        self._take(store, store.read_shard(shard))

    def _take(self, store: RolloutStore, rollouts: MappedRollouts) -> None:
        if rollouts:
            self._places[store.path] = [Places(rollouts), *self._places.get(store.path, [])[:1]]

    def _made(
        self, store: RolloutStore, parts: Sequence[Part], model: PreTrainedModel, together: Processes = ALONE
    ) -> Iterator[None]:
        """Run the teacher over the shards whose states are not there, one at a time.

        together: processes that divide the teacher, of which the main one looks and writes.
        """
        paths = [states_path(inside(store.path, shard.file)) for shard, _ in parts]
        whole = together.on_main(lambda: self._whole(store, parts, paths))
        for path, (shard, rollouts), there in zip(paths, parts, whole, strict=True):
            if not there:
                encoded = self._encoded(rollouts, model)
                together.on_main(lambda: _save(path, encoded, self._made_of(shard)))  # noqa: B023 - called at once
            yield

    def _whole(self, store: RolloutStore, parts: Sequence[Part], paths: Sequence[Path]) -> list[bool]:
        """Tell of each shard whether its states are there and whole."""
        there = [path.name for path in paths if path.exists()]
        known = dict(zip(there, known_files(store.path, there, states_hash), strict=True))
        return [
            path.name in known and _is_of(path, self._made_of(shard), known[path.name])
            for path, (shard, _) in zip(paths, parts, strict=True)
        ]

    def _made_of(self, shard: ShardEntry) -> dict[str, str]:
        kind = self.kind if self.kind == "exact" else f"int8 with a scale for {GROUP}"
        return {"shard": shard.sha256, "teacher": self.teacher, "kind": kind}

    def of(self, rollouts: Sequence[Rollout], counts: Sequence[int]) -> Tensor:
        """Return the states that predict the first ``counts`` completion tokens of each rollout, (M, H).

        They have the teacher's dtype, or float32 where they were kept as int8. A file is mapped for one call: what was
        read stays in the system's cache, and is no memory of this process.
        """
        opened = cache(lambda path: safe_open(path, "pt"))
        found = [(*self._place(rollout), count) for rollout, count in zip(rollouts, counts, strict=True)]
        return torch.cat([self._read(opened(path), start, count) for path, start, count in found])

    def _place(self, rollout: Rollout) -> tuple[Path, int]:
        """Return the file that has a rollout's states, and where they begin."""
        for places in chain.from_iterable(self._places.values()):
            if found := places.find(rollout):
                return states_path(places.shards.paths[found[0]]), found[1]
        raise StoreError(
            f"no states of the teacher are kept for sample {rollout.sample_index} of prompt {rollout.prompt_id} "
            f"({rollout.source}); rollout.keep_states=no has the teacher read it"
        )

    def _read(self, file: "safe_open", start: int, count: int) -> Tensor:
        names = ["states"] if self.kind == "exact" else ["states", "scale"]
        parts = {name: file.get_slice(name)[start : start + count] for name in names}
        return parts["states"] if self.kind == "exact" else from_int8(parts)

    def _encoded(self, rollouts: Sequence[Rollout], model: PreTrainedModel) -> dict[str, Tensor]:
        states = torch.cat([predicting_states(model, collate(part)).cpu() for part in split(rollouts, BATCH)])
        return {"states": states} if self.kind == "exact" else int8(states)


def _save(path: Path, encoded: dict[str, Tensor], made_of: dict[str, str]) -> None:
    with atomic_path(path) as temporary:
        save_file(encoded, temporary, {MADE_OF: json.dumps(made_of | {"sha256": content_hash(encoded)})})


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and numbers of tensors, hexadecimal."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def group_size(hidden: int) -> int:
    """Return how many numbers share a scale: 32, or the largest power of two that divides ``hidden``."""
    return math.gcd(GROUP, hidden)


def int8(states: Tensor) -> dict[str, Tensor]:
    """Round states, (M, H), to 8-bit integers, with a half-precision scale for every group, (M, groups)."""
    groups = states.float().unflatten(-1, (-1, group_size(states.shape[-1])))
    scale = (groups.abs().amax(-1) / 127).clamp(min=SMALLEST).half()
    rounded = (groups / scale.float().unsqueeze(-1)).round_().clamp_(-127, 127)
    return {"states": rounded.flatten(-2).to(torch.int8), "scale": scale}


def from_int8(kept: dict[str, Tensor]) -> Tensor:
    """Undo ``int8``, in float32."""
    groups = kept["states"].float().unflatten(-1, (kept["scale"].shape[-1], -1))
    return (groups * kept["scale"].float().unsqueeze(-1)).flatten(-2)


def states_path(shard: Path) -> Path:
    """Return where the states of a shard lie."""
    return shard.with_suffix(".states.safetensors")


def states_hash(path: Path) -> str:
    """Hash what a file holds like ``content_hash``; nothing for one that is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return content_hash({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - safe_open is not iterable
    except (OSError, ValueError, SafetensorError):
        return ""


def _is_of(path: Path, made_of: dict[str, str], content: str) -> bool:
    """Tell whether a file holds the states of this shard and teacher, whole; those of older kdctl have no hash."""
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
        said = json.loads(said[MADE_OF]) if MADE_OF in said else said
        return said.pop("sha256", content) == content != "" and said == made_of
    except (OSError, ValueError, SafetensorError):
        return False
