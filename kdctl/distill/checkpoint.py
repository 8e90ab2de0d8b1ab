"""Training state on disk: what is trained and the optimizer's tensors as safetensors, the rest as JSON, no pickles.

The data order, the λ draw and the learning rate are functions of the step, so the step is all else there is to keep.
"""

import re
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from kdctl.base.errors import ProcessError
from kdctl.distill.shadow import Shadow
from kdctl.distill.shard_files import SUFFIX, ShardWriter, Staging, Wholes, cause, spread
from kdctl.run.files import remove, replace_folder, scratch_folder, sha256, sweep_up
from kdctl.run.paths import require_free_space
from kdctl.run.record_files import damaged, read_record, write_record
from kdctl.run.records import CheckpointMeta
from kdctl.system.distributed import ALONE, Processes, passes
from kdctl.system.memory import spare_bytes

META = "meta.json"
TRAINED = "trained"
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


class Checkpoints:
    """One training's checkpoints: each process writes and reads its part, and training goes on while one is written.

    Use it in a with-statement, which waits for the one that is being written; all processes must make it, and save and
    load at the same steps. note: is told where there is no memory for a copy, so that training waits.
    """

    def __init__(
        self,
        root: Path,
        shadow: Shadow,
        optimizer: torch.optim.Optimizer,
        processes: Processes = ALONE,
        note: Callable[[str], None] = lambda text: None,
    ):
        self.root, self.shadow, self.optimizer, self.processes, self.note = root, shadow, optimizer, processes, note
        self._group = processes.beside()
        self._wholes = Wholes(self._state(), processes, self._group)
        self._staging: Staging | None = None
        self._writing: Future[Any] | None = None
        self._folder = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What ended training matters more than that its last checkpoint could not be written.
        with suppress(OSError, ProcessError) if kind else nullcontext():
            self.wait()

    def save(self, meta: CheckpointMeta, keep_last: int, best: int | None = None) -> None:
        """Copy the state and begin to write it; once it is whole, remove all but ``keep_last`` and that of ``best``.

        Waits for the checkpoint before. Raises what went wrong with that one.
        """
        self.wait()
        path = checkpoint_path(self.root, meta.step)
        state = spread(self._state(), self.processes)
        folder = self.processes.on_main(lambda: self._folder.enter_context(scratch_folder(path)))

        def publish(sums: dict[str, str]) -> None:
            write_record(folder / META, meta.model_copy(update={"files": sums}))
            replace_folder(folder, path)
            prune(self.root, keep_last, best)

        if self._staging is None:
            self._staging = Staging(self._wholes, self._has_room(state))
        writing = dcp.async_save(
            state,
            storage_writer=ShardWriter(folder, publish),
            async_stager=self._staging,
            process_group=self._group,
            no_dist=self._group is None,
        )
        self._writing = writing if isinstance(writing, Future) else writing.upload_completion
        if not self._staging.copies:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is there. Raises what went wrong with it."""
        if self._writing is None:
            return
        try:
            with passes():
                self._writing.result()
        except dcp.CheckpointException as error:
            raise cause(error) from error
        finally:
            if self._writing.done():
                self._writing = None
                self._folder.close()

    def load(self, step: int) -> None:
        """Put a step's state back and write Q(W) into the student.

        Raises StoreError if a file is not the one that was written.
        """
        self.wait()
        path, meta = open_checkpoint(self.root, step)
        self._check(path, meta.files or {"state.safetensors": meta.sha256})
        reader = dcp.HuggingFaceStorageReader(str(path))
        self._make_state(reader)
        try:
            with passes(), torch.no_grad():
                state = self._wholes.of(self._state())
                dcp.load(state, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except dcp.CheckpointException as error:
            raise cause(error) from error
        for trained in self.shadow.parameters():
            self.optimizer.state[trained][STEP] = torch.tensor(float(meta.step), device=trained.device)
        self.shadow.write_back()

    def _state(self) -> dict[str, Tensor]:
        """Name this process's tensors: what is trained and, but for the step, the optimizer's state of it."""
        found: dict[str, Tensor] = {}
        for name, trained in self.shadow.trained.items():
            moments = {key: value for key, value in self.optimizer.state[trained].items() if key != STEP}
            found |= {f"{key}.{name}": tensor.detach() for key, tensor in {TRAINED: trained, **moments}.items()}
        return found

    def _make_state(self, reader: dcp.HuggingFaceStorageReader) -> None:
        """Give the optimizer room for what its first step would make, where it did not start with it."""
        for stored, description in reader.read_metadata().state_dict_metadata.items():
            key, _, name = stored.partition(".")
            state = self.optimizer.state[self.shadow.trained[name]]
            if key != TRAINED and key not in state and isinstance(description, dcp.TensorStorageMetadata):
                state[key] = torch.empty(description.size, device=self.shadow.trained[name].device)

    def _check(self, path: Path, sums: dict[str, str]) -> None:
        """Raise StoreError if files are not those that were written; each is read by one process."""
        if {file.name for file in path.glob(f"*{SUFFIX}")} != sums.keys():
            raise damaged(path / META, f"its files are to be {', '.join(sums)}, and others are there")
        names = sorted(sums)
        mine = [name if sha256(path / name) != sums[name] else None for name in self.processes.share(names)]
        for name in filter(None, self.processes.merge(mine)):
            raise damaged(path / name, "it is not the file that was written")

    def _has_room(self, state: dict[str, Tensor]) -> bool:
        """Tell whether a copy of tensors fits into CPU memory beside training; from a GPU they are copied anyway."""
        size, spare = sum(tensor.nbytes for tensor in state.values()), spare_bytes(self.processes.count)
        if size <= spare or any(not tensor.is_cpu for tensor in state.values()):
            return True
        self.note(
            f"training waits while a checkpoint is written: a copy that would let it go on takes {size / 2**30:,.2f} "
            f"GiB, and {max(0, spare) / 2**30:,.2f} GiB of memory are free beside training"
        )
        return False
