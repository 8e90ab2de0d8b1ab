"""Training state on disk: what is trained and the optimizer's tensors as safetensors, the rest as JSON, no pickles.

The data order, the λ draw and the learning rate are functions of the step, so the step is all else there is to keep.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kdctl.distill.shadow import Shadow
from kdctl.run.files import atomic_folder, remove, sha256, sweep_up, writing
from kdctl.run.paths import require_free_space
from kdctl.run.record_files import damaged, read_record, write_record
from kdctl.run.records import CheckpointMeta
from kdctl.system.distributed import ALONE, Processes

TENSORS = "state.safetensors"
META = "meta.json"
STEP = "step"
STEP_NAME = re.compile(r"step_\d+$")


def checkpoint_path(root: Path, step: int) -> Path:
    """Name the folder of a step's checkpoint."""
    return root / f"step_{step:06d}"


def saved_steps(root: Path) -> list[int]:
    """List the steps that have a checkpoint, in order."""
    return sorted(int(path.name.removeprefix("step_")) for path in root.glob("step_*") if STEP_NAME.match(path.name))


def checkpoint_bytes(shadow: Shadow) -> int:
    """Return the most that one checkpoint takes: what is trained and AdamW's two moments of it, in float32."""
    return sum(3 * 4 * tensor.numel() for tensor in shadow.parameters())


def require_room(root: Path, size: int, kept: int) -> str:
    """Raise StoreError if the disk has no room for ``kept`` checkpoints of ``size`` bytes and one more being written.

    Returns what they take at most, in words. Removes what a killed run left half-written; checkpoints that are there
    count as room.
    """
    sweep_up(root)
    most = (kept + 1) * size
    there = sum(path.stat().st_size for path in root.glob("step_*/*"))
    require_free_space(root, most - there, f"training ({kept} checkpoint(s) and the one being written)")
    return f"checkpoints: {most / 2**20:,.1f} MiB at most, {kept} and the one being written, in {root}"


def save_checkpoint(
    root: Path,
    shadow: Shadow,
    optimizer: torch.optim.Optimizer,
    meta: CheckpointMeta,
    keep_last: int,
    best: int | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Write a checkpoint atomically, then remove all but the ``keep_last`` newest and that of step ``best``.

    The main process writes; where rows are divided it gets those of the others, which must call this too.
    """
    path = checkpoint_path(root, meta.step)
    tensors = {}
    for name, trained in shadow.trained.items():
        state = {key: value for key, value in optimizer.state[trained].items() if key != STEP}
        for key, value in {"trained": trained.detach(), **state}.items():
            tensors[f"{key}.{name}"] = processes.whole(value)
    if not processes.is_main:
        return path
    with atomic_folder(path) as temporary:
        with writing(temporary / TENSORS):
            save_file(tensors, temporary / TENSORS)
        write_record(temporary / META, meta.model_copy(update={"sha256": sha256(temporary / TENSORS)}))
    prune(root, keep_last, best)
    return path


def prune(root: Path, keep_last: int, best: int | None) -> None:
    """Remove all checkpoints but the ``keep_last`` newest and that of step ``best``."""
    for old in saved_steps(root)[:-keep_last]:
        if old != best:
            remove(checkpoint_path(root, old))


def latest_checkpoint(root: Path) -> tuple[Path, CheckpointMeta] | None:
    """Find the newest checkpoint."""
    steps = saved_steps(root)
    return open_checkpoint(root, steps[-1]) if steps else None


def open_checkpoint(root: Path, step: int) -> tuple[Path, CheckpointMeta]:
    """Find a step's checkpoint. Raises StoreError if it is not there."""
    path = checkpoint_path(root, step)
    return path, read_record(path / META, CheckpointMeta)


def load_checkpoint(
    path: Path,
    meta: CheckpointMeta,
    shadow: Shadow,
    optimizer: torch.optim.Optimizer,
    processes: Processes = ALONE,
) -> None:
    """Put what is trained and the optimizer's tensors back and write Q(W) into the student.

    Raises StoreError if the file is not the one that was written.
    """
    if not (path / TENSORS).is_file() or sha256(path / TENSORS) != meta.sha256:
        raise damaged(path / TENSORS, "it is not the file that was written")
    tensors = load_file(path / TENSORS)
    kinds = {name.partition(".")[0] for name in tensors} - {"trained"}
    with torch.no_grad():
        for name, trained in shadow.trained.items():
            trained.copy_(processes.rows(tensors[f"trained.{name}"]))
            state = optimizer.state[trained]
            state[STEP] = torch.tensor(float(meta.step), device=trained.device)
            for kind in kinds:
                if (saved := tensors.get(f"{kind}.{name}")) is not None:
                    saved = processes.rows(saved)
                    state[kind] = state[kind].copy_(saved) if kind in state else saved.to(trained.device)
    shadow.write_back()
