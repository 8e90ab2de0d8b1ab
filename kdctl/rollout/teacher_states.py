"""The teacher's final hidden states beside a rollout store, so that later training needs no pass of the teacher.

H numbers a token instead of V logits: the output head is shared and frozen, so every divergence is recomputed exactly
from them. One safetensors file a shard, read through a memory map; it names the shard and the teacher that it is of and
is written again where either has changed. ``int8`` takes about half: rounded to nearest, with a scale for every 32
numbers, since a few of a token's are ten times as large as the others.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.base.progress import Reporter
from kdctl.model.batch import collate, predicting_states, split
from kdctl.rollout.store import RolloutStore
from kdctl.run.files import atomic_path
from kdctl.run.names import inside
from kdctl.run.paths import require_free_space
from kdctl.run.records import Rollout, ShardEntry
from kdctl.system.distributed import ALONE, Processes

Kind = Literal["exact", "int8"]
Key = tuple[str, str, int]
BATCH = 16
GROUP = 32
MADE_OF = "made_of"
"""The one key of a file's metadata: safetensors writes several in an order that differs from process to process."""
SMALLEST = 2.0**-24
"""The smallest positive half-precision number."""


def key_of(rollout: Rollout) -> Key:
    """Return what tells a rollout from the others that a training run reads."""
    return rollout.source, rollout.prompt_id, rollout.sample_index


@dataclass
class TeacherStates:
    """Stored states of several stores, found by rollout.

    teacher: fingerprint of the model that they are of.
    """

    teacher: str
    kind: Kind = "exact"
    _places: dict[Key, tuple[Path, int, int]] = field(default_factory=dict)
    _open: dict[Path, "safe_open"] = field(default_factory=dict)

    def fill(
        self, store: RolloutStore, model: PreTrainedModel, reporter: Reporter, processes: Processes = ALONE
    ) -> None:
        """Take up a finished store, running the teacher over the shards whose states are not there."""
        shards = store.manifest().shards
        mine = processes.share(shards)
        need = sum(s.completion_tokens for s in shards) * model.config.hidden_size * model.dtype.itemsize
        require_free_space(store.path, need, f"keeping the teacher's states of {store.path.name}")
        with reporter.task(f"teacher reads {store.path.name} completions", "shards") as advance:
            for done, shard in enumerate(mine):
                self.add(store, shard, store.read_shard(shard), model)
                advance(done + 1, len(mine))
        processes.wait()
        for shard in [shard for shard in shards if shard not in mine]:
            self.add(store, shard, store.read_shard(shard), model)

    def add(self, store: RolloutStore, shard: ShardEntry, rollouts: Sequence[Rollout], model: PreTrainedModel) -> None:
        """Take up one shard, running the teacher over it where its states are not there."""
        path = inside(store.path, shard.file).with_suffix(".states.safetensors")
        kind = self.kind if self.kind == "exact" else f"int8 with a scale for {GROUP}"
        made_of = {"shard": shard.sha256, "teacher": self.teacher, "kind": kind}
        if not _is_of(path, made_of):
            encoded = self._encoded(rollouts, model)
            with atomic_path(path) as temporary:
                save_file(encoded, temporary, {MADE_OF: json.dumps(made_of | {"sha256": content_hash(encoded)})})
        self._open.pop(path, None)
        start = 0
        for rollout in rollouts:
            count = len(rollout.completion_ids) - (not rollout.prompt_ids)
            self._places[key_of(rollout)] = (path, start, count)
            start += count

    def of(self, rollouts: Sequence[Rollout], counts: Sequence[int]) -> Tensor:
        """Return the states that predict the first ``counts`` completion tokens of each rollout, (M, H).

        They have the teacher's dtype, or float32 where they were kept as int8.
        """
        parts = [self._read(*self._places[key_of(r)][:2], n) for r, n in zip(rollouts, counts, strict=True)]
        return torch.cat(parts)

    def _read(self, path: Path, start: int, count: int) -> Tensor:
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        file = self._open[path]
        names = ["states"] if self.kind == "exact" else ["states", "scale"]
        parts = {name: file.get_slice(name)[start : start + count] for name in names}
        return parts["states"] if self.kind == "exact" else from_int8(parts)

    def _encoded(self, rollouts: Sequence[Rollout], model: PreTrainedModel) -> dict[str, Tensor]:
        states = torch.cat([predicting_states(model, collate(part)).cpu() for part in split(rollouts, BATCH)])
        return {"states": states} if self.kind == "exact" else int8(states)


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


def _is_of(path: Path, made_of: dict[str, str]) -> bool:
    """Tell whether a file holds the states of this shard and teacher, whole; those of older kdctl have no hash."""
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            said = json.loads(said[MADE_OF]) if MADE_OF in said else said
            known = said.pop("sha256", None)
            if said != made_of:
                return False
            return known is None or known == content_hash({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - safe_open is not iterable
    except (OSError, ValueError, SafetensorError):
        return False
