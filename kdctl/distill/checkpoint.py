"""Training state on disk: masters and AdamW moments as safetensors, the rest as JSON; nothing is pickled.

The data order, the λ draw and the learning rate are functions of the step, so the step is all else there is to keep.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kdctl.errors import StoreError
from kdctl.quant.shadow import ShadowWeights
from kdctl.records import CheckpointMeta
from kdctl.rundir import atomic_folder, read_record, sha256, write_record

TENSORS = "state.safetensors"
META = "meta.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoint_path(root: Path, step: int) -> Path:
    """Name the folder of a step's checkpoint."""
    return root / f"step_{step:06d}"


def checkpoint_bytes(shadow: ShadowWeights) -> int:
    """Return the size of one checkpoint: master and two moments in float32."""
    return sum(3 * 4 * master.numel() for master in shadow.masters.values())


def save_checkpoint(
    root: Path, shadow: ShadowWeights, optimizer: torch.optim.Optimizer, meta: CheckpointMeta, keep_last: int
) -> Path:
    """Write a checkpoint atomically, then remove all but the ``keep_last`` newest."""
    tensors = {}
    for name, master in shadow.masters.items():
        tensors[f"master.{name}"] = master.detach()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[master][moment]
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


def load_checkpoint(path: Path, meta: CheckpointMeta, shadow: ShadowWeights, optimizer: torch.optim.Optimizer) -> None:
    """Put masters and moments back and write Q(master) into the student.

    Raises StoreError if the file is not the one that was written.
    """
    if sha256(path / TENSORS) != meta.sha256:
        raise StoreError(f"{path / TENSORS} is damaged; remove {path} to go on from an earlier checkpoint or the start")
    tensors = load_file(path / TENSORS)
    with torch.no_grad():
        for name, master in shadow.masters.items():
            master.copy_(tensors[f"master.{name}"])
            state = {moment: tensors[f"{moment}.{name}"].to(master.device) for moment in MOMENTS}
            optimizer.state[master] = {"step": torch.tensor(float(meta.step), device=master.device), **state}
    shadow.write_back()
