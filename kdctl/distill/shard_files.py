"""Tensors of several processes in one folder, through ``torch.distributed.checkpoint`` (DCP): safetensors, no pickles.

A process writes what it has into a file of its own, which says where in a whole tensor its rows begin; DCP's reader for
safetensors finds from that what another number of processes must read of which file.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.futures import Future

from kdctl.run.files import sha256, sync, writing
from kdctl.system.distributed import Processes

SUFFIX = ".safetensors"
OFFSETS = "DCP_SHARDING_INFO"
"""Where DCP's reader looks for the offsets of the parts in a file."""

# One process alone is no mistake, and what DCP says of it comes from a thread, where nothing can be caught.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class Wholes:
    """What rows of several processes are parts of, as DTensors (``Shard(0)``); where nothing is divided, as they are.

    Every process must make it from tensors of the same names.
    """

    def __init__(self, tensors: Mapping[str, Tensor], processes: Processes, group: ProcessGroup | None):
        self._mesh = cache(lambda device: _mesh(processes, group, device)) if group and processes.sharded else None
        counts = (
            processes.merge([[len(tensor) for tensor in tensors.values()]])[: processes.parts] if self._mesh else []
        )
        self._rows = dict(zip(tensors, map(sum, zip(*counts, strict=True)), strict=False))

    def of(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what rows are parts of, without a copy."""
        if self._mesh is None:
            return dict(rows)
        return {name: self._whole(self._mesh(tensor.device.type), name, tensor) for name, tensor in rows.items()}

    def _whole(self, mesh: DeviceMesh, name: str, rows: Tensor) -> DTensor:
        like = torch.empty(self._rows[name], *rows.shape[1:], device="meta")
        placed = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        return DTensor.from_local(rows, mesh, placed, run_check=False, shape=like.shape, stride=like.stride())


def _mesh(processes: Processes, group: ProcessGroup, device: str) -> DeviceMesh:
    """Say where each process's rows lie; nothing is sent over it."""
    if processes.copies == 1:
        return DeviceMesh.from_group(group, device)
    places = torch.arange(processes.count).view(processes.copies, processes.parts)
    return DeviceMesh(device, places, mesh_dim_names=("copies", "rows"), _init_backend=False)


class Staging(AsyncStager):
    """Copies of tensors in CPU memory, made once and filled at each checkpoint, or the tensors themselves.

    The copies let training go on while they are written.
    """

    _synchronize_after_execute = False

    def __init__(self, wholes: Wholes, copies: bool):
        self.copies, self._wholes = copies, wholes
        self._kept: dict[str, Tensor] = {}

    def stage(self, state_dict: dict[str, Tensor]) -> dict[str, Any]:
        """Return tensors that are to be written; ``state_dict``'s may change after that where there are copies."""
        return self._wholes.of({name: self._copy(name, each) for name, each in state_dict.items()})

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if not self.copies:
            return tensor
        if name not in self._kept:
            self._kept[name] = torch.empty_like(tensor, device="cpu")
        return self._kept[name].copy_(tensor)


class ShardWriter(HuggingFaceStorageWriter):
    """Writes what each process has into one file; when all have, the main one calls ``publish`` with their sha256."""

    def __init__(self, folder: Path, publish: Callable[[dict[str, str]], None]):
        super().__init__(str(folder), save_distributed=True)
        self._folder, self._publish = folder, publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """Write this process's file and hash it."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        file = self._folder / f"shard_{plan.storage_data['shard_index']:05d}{SUFFIX}"
        tensors: dict[str, Any] = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        offsets = {item.index.fqn: {"saved_offsets": item.index.offset} for item in plan.items}
        with writing(file):
            save_file(tensors, file, {OFFSETS: json.dumps(offsets)})
        sync(file)
        stored = (file.name, sha256(file))
        return [WriteResult(item.index, tensors[item.index.fqn].nbytes, stored) for item in plan.items]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish what all have written."""
        self._publish(dict(sorted({result.storage_data for each in results for result in each})))


def cause(error: CheckpointException) -> BaseException:
    """Return what went wrong first, in the process of the lowest rank that failed."""
    return error.failures[min(error.failures)][0]


def spread(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Return what this process is to write: its rows where they are divided, else its share of whole tensors."""
    if processes.sharded:
        return dict(tensors)
    largest_first: Sequence[str] = sorted(tensors, key=lambda name: -tensors[name].numel())
    return {name: tensors[name] for name in processes.share(largest_first)}
