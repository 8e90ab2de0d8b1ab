"""Training state on disk."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kdctl.base.errors import StoreError
from kdctl.config.preset import DistillSection
from kdctl.distill.checkpoint import (
    TENSORS,
    checkpoint_bytes,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from kdctl.distill.optimizer import make_optimizer, update
from kdctl.distill.shadow import ShadowWeights
from kdctl.quant.affine import Grid
from kdctl.quant.scales import minmax, quantize_weight
from kdctl.run.records import CheckpointMeta


def training(seed: int = 0, optimizer: str = "adamw") -> tuple[nn.Module, ShadowWeights, torch.optim.Optimizer]:
    """Build a one-layer student with its masters and optimizer."""
    torch.manual_seed(seed)
    teacher, student = nn.ModuleDict({"a": nn.Linear(32, 16)}), nn.ModuleDict({"a": nn.Linear(32, 16)})
    weight = teacher.get_parameter("a.weight").detach()
    shadow = ShadowWeights(student, {"a": quantize_weight(weight, minmax, Grid(4, 32, False), torch.float32)}, teacher)
    shadow.write_back()
    settings = DistillSection.model_validate({"lr": 1e-2, "optimizer": optimizer})
    return student, shadow, make_optimizer(shadow, settings)


def advance(student: nn.Module, optimizer: torch.optim.Optimizer, shadow: ShadowWeights, steps: int) -> None:
    """Do optimizer steps on a fixed objective."""
    x = torch.linspace(-1, 1, 64).view(2, 32)
    for _ in range(steps):
        student["a"](x).square().sum().backward()  # pyright: ignore[reportIndexIssue]
        update(optimizer, shadow.parameters(), 1.0)
        shadow.write_back()


def meta(step: int) -> CheckpointMeta:
    return CheckpointMeta(identity="x", step=step, sha256="")


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_resumed_optimizer_steps_equal_uninterrupted_ones(tmp_path: Path, kind: str) -> None:
    student, shadow, optimizer = training(0, kind)
    advance(student, optimizer, shadow, 3)
    path = save_checkpoint(tmp_path, shadow, optimizer, meta(3), keep_last=1)
    advance(student, optimizer, shadow, 4)
    other_student, other_shadow, other_optimizer = training(0, kind)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == path
    load_checkpoint(*found, other_shadow, other_optimizer)
    advance(other_student, other_optimizer, other_shadow, 4)
    assert torch.equal(shadow.masters["a"], other_shadow.masters["a"])
    assert torch.equal(student.get_parameter("a.weight"), other_student.get_parameter("a.weight"))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    student, shadow, optimizer = training()
    for step in (1, 2, 3):
        advance(student, optimizer, shadow, 1)
        save_checkpoint(tmp_path, shadow, optimizer, meta(step), keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def test_an_unfinished_checkpoint_is_not_found(tmp_path: Path) -> None:
    (tmp_path / ".step_000009.tmp").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    student, shadow, optimizer = training()
    advance(student, optimizer, shadow, 1)
    save_checkpoint(tmp_path, shadow, optimizer, meta(1), keep_last=1)
    file = checkpoint_path(tmp_path, 1) / TENSORS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(StoreError, match="damaged"):
        load_checkpoint(*found, shadow, optimizer)


def test_stated_size_is_that_on_disk(tmp_path: Path) -> None:
    student, shadow, optimizer = training()
    advance(student, optimizer, shadow, 1)
    path = save_checkpoint(tmp_path, shadow, optimizer, meta(1), keep_last=1)
    size = (path / TENSORS).stat().st_size
    assert checkpoint_bytes(shadow) <= size < checkpoint_bytes(shadow) + 2048
