"""Training state on disk."""

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdctl.base.errors import StoreError
from kdctl.config.preset import DistillSection
from kdctl.distill.checkpoint import Checkpoints, checkpoint_bytes, checkpoint_path, latest_checkpoint, saved_steps
from kdctl.distill.optimizer import make_optimizer, update
from kdctl.distill.shadow import ShadowWeights
from kdctl.quant.affine import Grid
from kdctl.quant.scales import minmax, quantize_weight
from kdctl.run import files
from kdctl.run.record_files import read_record, write_record
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
    return CheckpointMeta(identity="x", step=step)


def save(root: Path, shadow: ShadowWeights, optimizer: torch.optim.Optimizer, step: int, keep_last: int = 2) -> Path:
    """Write a checkpoint and wait for it."""
    with Checkpoints(root, shadow, optimizer) as checkpoints:
        checkpoints.save(meta(step), keep_last)
    return checkpoint_path(root, step)


def shard(folder: Path) -> Path:
    """Return the one file of tensors that one process writes."""
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_resumed_optimizer_steps_equal_uninterrupted_ones(tmp_path: Path, kind: str) -> None:
    student, shadow, optimizer = training(0, kind)
    advance(student, optimizer, shadow, 3)
    with Checkpoints(tmp_path, shadow, optimizer) as checkpoints:
        checkpoints.save(meta(3), keep_last=1)
        advance(student, optimizer, shadow, 4)  # while it is written
    other_student, other_shadow, other_optimizer = training(0, kind)
    Checkpoints(tmp_path, other_shadow, other_optimizer).load(3)
    advance(other_student, other_optimizer, other_shadow, 4)
    assert torch.equal(shadow.masters["a"], other_shadow.masters["a"])
    assert torch.equal(student.get_parameter("a.weight"), other_student.get_parameter("a.weight"))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    student, shadow, optimizer = training()
    for step in (1, 2, 3):
        advance(student, optimizer, shadow, 1)
        save(tmp_path, shadow, optimizer, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def test_an_unfinished_checkpoint_is_not_found(tmp_path: Path) -> None:
    (tmp_path / ".step_000009.tmp").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_a_checkpoint_is_a_record_and_safetensors(tmp_path: Path) -> None:
    _, shadow, optimizer = training()
    path = save(tmp_path, shadow, optimizer, 1)
    assert {file.name for file in path.iterdir()} == {"meta.json", "shard_00001.safetensors"}
    found = read_record(path / "meta.json", CheckpointMeta)
    assert found.files == {"shard_00001.safetensors": files.sha256(shard(path))}
    assert {name.partition(".")[0] for name in load_file(shard(path))} == {"trained", "exp_avg", "exp_avg_sq"}


def on_disk(operation: str, suffix: str, do: Callable[[Path], object]) -> Callable[[str, Path], None]:
    """Return a disk on which something happens before operations on files of a kind."""

    def before(found: str, path: Path) -> None:
        if found == operation and path.suffix == suffix:
            do(path)

    return before


def test_training_goes_on_while_the_state_before_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, shadow, optimizer = training()
    advance(student, optimizer, shadow, 1)
    saved, go_on = shadow.masters["a"].detach().clone(), Event()
    monkeypatch.setattr(files, "before", on_disk("write", ".safetensors", lambda path: go_on.wait(60)))
    with Checkpoints(tmp_path, shadow, optimizer) as checkpoints:
        checkpoints.save(meta(1), keep_last=1)
        advance(student, optimizer, shadow, 2)
        assert latest_checkpoint(tmp_path) is None
        go_on.set()
        checkpoints.save(meta(3), keep_last=2)  # waits for the one before
        assert latest_checkpoint(tmp_path) is not None
    assert not torch.equal(shadow.masters["a"], saved)
    checkpoints.load(1)
    assert torch.equal(shadow.masters["a"], saved)


def test_without_memory_for_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, shadow, optimizer = training()
    advance(student, optimizer, shadow, 1)
    size = checkpoint_bytes(shadow)
    said: list[str] = []
    for spare, steps in ((size - 1, [1]), (size, [])):
        monkeypatch.setattr("kdctl.distill.checkpoint.spare_bytes", lambda count, spare=spare: spare)
        written = Event()
        monkeypatch.setattr(files, "before", on_disk("write", ".safetensors", lambda path, done=written: done.wait(1)))
        with Checkpoints(tmp_path / str(spare), shadow, optimizer, note=said.append) as checkpoints:
            checkpoints.save(meta(1), keep_last=1)
            found = saved_steps(checkpoints.root)
            written.set()
            assert found == steps
    (note,) = said
    assert "training waits while a checkpoint is written" in note


def full(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize(("operation", "suffix"), [("write", ".safetensors"), ("write", ".tmp"), ("rename", "")])
def test_a_disk_that_is_full_is_said_at_the_next_checkpoint_and_the_last_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, suffix: str
) -> None:
    _, shadow, optimizer = training()
    save(tmp_path, shadow, optimizer, 1)
    monkeypatch.setattr(files, "before", on_disk(operation, suffix, full))
    checkpoints = Checkpoints(tmp_path, shadow, optimizer)
    checkpoints.save(meta(2), keep_last=1)
    with pytest.raises(OSError, match=r"No space left on device.*step_000002"):
        checkpoints.save(meta(3), keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_what_stops_training_is_raised_and_not_what_its_last_checkpoint_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, shadow, optimizer = training()
    monkeypatch.setattr(files, "before", on_disk("write", ".safetensors", full))

    def stopped(by: BaseException | None) -> None:
        with Checkpoints(tmp_path, shadow, optimizer) as checkpoints:
            checkpoints.save(meta(1), keep_last=1)
            if by is not None:
                raise by

    with pytest.raises(KeyboardInterrupt):
        stopped(KeyboardInterrupt())
    with pytest.raises(OSError, match="No space"):
        stopped(None)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_training_waits_for_a_checkpoint_leaves_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, shadow, optimizer = training()
    waiting = Event()

    def interrupt(path: Path) -> None:
        waiting.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

    def interrupted() -> None:
        with Checkpoints(tmp_path, shadow, optimizer) as checkpoints:
            checkpoints.save(meta(1), keep_last=1)
            waiting.set()
            checkpoints.wait()

    monkeypatch.setattr(files, "before", on_disk("write", ".safetensors", interrupt))
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert saved_steps(tmp_path) == [1]


def killed_at(operation: int, root: Path) -> int:
    """Write a second checkpoint in a process that dies before its n-th change of the disk; return how it ended."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done = iter(range(operation))
    files.before = lambda found, path: next(done, None) is None and os.kill(os.getpid(), signal.SIGKILL)  # pyright: ignore
    try:
        _, shadow, optimizer = training()
        save(root, shadow, optimizer, 2, keep_last=1)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that it forked")
def test_killed_at_any_moment_a_good_checkpoint_is_left(tmp_path: Path) -> None:
    _, shadow, optimizer = training()
    save(tmp_path / "first", shadow, optimizer, 1)
    ends, newest = [], []
    for operation in range(100):
        root = shutil.copytree(tmp_path / "first", tmp_path / str(operation))
        ends.append(killed_at(operation, root))
        files.sweep_up(root)
        found = latest_checkpoint(root)
        assert found is not None
        Checkpoints(root, shadow, optimizer).load(found[1].step)
        assert {path.name for path in root.iterdir()} <= {"step_000001", "step_000002"}
        newest.append(found[1].step)
        if not ends[-1]:
            break
    assert ends == [-signal.SIGKILL] * (len(ends) - 1) + [0]
    assert newest == sorted(newest)
    assert newest.count(1) > 5


def test_a_file_that_is_missing_or_too_many_is_refused(tmp_path: Path) -> None:
    _, shadow, optimizer = training()
    file = shard(save(tmp_path, shadow, optimizer, 1))
    shutil.copy(file, file.with_name("shard_00002.safetensors"))
    with pytest.raises(StoreError, match="damaged"):
        Checkpoints(tmp_path, shadow, optimizer).load(1)
    file.unlink()
    with pytest.raises(StoreError, match="damaged"):
        Checkpoints(tmp_path, shadow, optimizer).load(1)


def test_a_checkpoint_that_one_process_wrote_for_all_is_read(tmp_path: Path) -> None:
    student, shadow, optimizer = training()
    advance(student, optimizer, shadow, 2)
    path = save(tmp_path, shadow, optimizer, 2)
    kept = shadow.masters["a"].detach().clone()
    tensors = load_file(shard(path))
    shard(path).unlink()
    save_file(tensors, path / "state.safetensors")
    write_record(path / "meta.json", CheckpointMeta(identity="x", step=2, sha256=files.sha256(shard(path))))
    _, other, other_optimizer = training(1)
    Checkpoints(tmp_path, other, other_optimizer).load(2)
    assert torch.equal(other.masters["a"], kept)


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    student, shadow, optimizer = training()
    advance(student, optimizer, shadow, 1)
    file = shard(save(tmp_path, shadow, optimizer, 1))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=rf"{file.name} is damaged"):
        Checkpoints(tmp_path, shadow, optimizer).load(1)


def test_stated_size_is_that_on_disk(tmp_path: Path) -> None:
    student, shadow, optimizer = training()
    advance(student, optimizer, shadow, 1)
    size = shard(save(tmp_path, shadow, optimizer, 1)).stat().st_size
    assert checkpoint_bytes(shadow) <= size < checkpoint_bytes(shadow) + 2048
