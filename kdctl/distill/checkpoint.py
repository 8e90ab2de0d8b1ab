"""Training state on disk: what is trained and the optimizer's tensors as safetensors, the rest as JSON, no pickles.

The data order, the λ draw and the learning rate are functions of the step, so the step is all else there is to keep.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kdctl.errors import StoreError
from kdctl.quant.shadow import Shadow
from kdctl.records import CheckpointMeta
from kdctl.rundir import atomic_folder, read_record, sha256, write_record

TENSORS = "state.safetensors"
META = "meta.json"
STEP = "step"


def checkpoint_path(root: Path, step: int) -> Path:
    """Name the folder of a step's checkpoint."""
    return root / f"step_{step:06d}"


def checkpoint_bytes(shadow: Shadow) -> int:
    """Return the most that one checkpoint takes: what is trained and AdamW's two moments of it, in float32."""
    return sum(3 * 4 * tensor.numel() for tensor in shadow.parameters())


def save_checkpoint(
    root: Path, shadow: Shadow, optimizer: torch.optim.Optimizer, meta: CheckpointMeta, keep_last: int
) -> Path:
    """Write a checkpoint atomically, then remove all but the ``keep_last`` newest."""
    tensors = {}
    for name, trained in shadow.trained.items():
        tensors[f"trained.{name}"] = trained.detach()
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[trained].items() if key != STEP}
    path = checkpoint_path(root, meta.step)
    with atomic_folder(path) as temporary:
        save_file(tensors, temporary / TENSORS)
        write_record(temporary / META, meta.model_copy(update={"sha256": sha256(temporary / TENSORS)}))
    for old in sorted(root.glob("step_*"))[:-keep_last]:
        shutil.rmtree(old)
    return path


def latest_checkpoint(root: Path) -> tuple[Path, CheckpointMeta] | None:
    """Find the newest checkpoint."""
    found = sorted(root.glob("step_*"))
    return (found[-1], read_record(found[-1] / META, CheckpointMeta)) if found else None


def load_checkpoint(path: Path, meta: CheckpointMeta, shadow: Shadow, optimizer: torch.optim.Optimizer) -> None:
    """Put what is trained and the optimizer's tensors back and write Q(W) into the student.

    Raises StoreError if the file is not the one that was written.
    """
    if sha256(path / TENSORS) != meta.sha256:
        raise StoreError(f"{path / TENSORS} is damaged; remove {path} to go on from an earlier checkpoint or the start")
    tensors = load_file(path / TENSORS)
    kinds = {name.partition(".")[0] for name in tensors} - {"trained"}
    with torch.no_grad():
        for name, trained in shadow.trained.items():
            trained.copy_(tensors[f"trained.{name}"])
            state = optimizer.state[trained]
            state[STEP] = torch.tensor(float(meta.step), device=trained.device)
            for kind in kinds:
                if (saved := tensors.get(f"{kind}.{name}")) is not None:
                    state[kind] = state[kind].copy_(saved) if kind in state else saved.to(trained.device)
    shadow.write_back()
