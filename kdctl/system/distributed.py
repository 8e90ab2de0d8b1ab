"""Several processes that work on one run: who does what, and what they tell each other.

``accelerate launch`` or ``torchrun`` starts them; each has its own copy of the models, or, where accelerate's
configuration asks for FSDP2, trains with its rows of them. What is divided is divided by position, what is not is
done by the main process while the others wait. All of them see the same run folder.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState, init_empty_weights
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kdctl.base.errors import KdctlError, PresetError, ProcessError
from kdctl.config.preset import DistillSection

T = TypeVar("T")
OTHER_SHARDING = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
LONGEST_WAIT = timedelta(days=7)
"""While the main process quantizes, the others wait; that one is dead is seen by its closed connection, at once."""
PIECE = 2**25
"""Numbers that are summed over processes at once, in float32."""


@dataclass(frozen=True)
class Processes:
    """One of ``count`` processes; alone, nothing here costs anything.

    sharded: models in training are divided by rows (FSDP2), not copied; freed: rows of others are freed between a
    layer's forward and backward pass; copies: groups of consecutive processes, each of which divides models of its own.
    """

    rank: int = 0
    count: int = 1
    sharded: bool = False
    freed: bool = True
    copies: int = 1

    @property
    def parts(self) -> int:
        """Count the processes that divide one model."""
        return self.count // self.copies

    @property
    def is_main(self) -> bool:
        """Tell whether this process writes what all share."""
        return self.rank == 0

    def check_rows(self, rows: int) -> None:
        """Raise PresetError if the rows of a step cannot be divided evenly."""
        if rows % self.count:
            fitting = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
            raise PresetError(
                f"distill.micro_batch_size × distill.gradient_accumulation = {rows} rows a step cannot be divided "
                f"evenly among {self.count} processes, so one would wait for another in every step; launch "
                f"{fitting} processes, or change one of the two"
            )

    def check_trainable(self, settings: DistillSection) -> None:
        """Raise PresetError if a step's rows do not divide evenly, or if models do and training needs them whole."""
        self.check_rows(settings.rows_per_step)
        if not self.sharded:
            return
        if settings.optimizer != "adamw":
            raise PresetError(
                f"the models are to be divided by FSDP2, and distill.optimizer={settings.optimizer} needs them whole; "
                "use adamw"
            )

    def span(self, length: int) -> slice:
        """Return which of so many rows are this process's where models are divided, as by ``Shard(0)``, else all."""
        if not self.sharded:
            return slice(0, length)
        size, place = -(-length // self.parts), self.rank % self.parts
        return slice(min(place * size, length), min((place + 1) * size, length))

    def whole(self, rows: Tensor) -> Tensor:
        """Put the rows of all processes together in the main one, on the CPU; the others get what they gave."""
        if not self.sharded:
            return rows
        counts = self.merge([len(rows)])
        mine = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype)
        mine[: len(rows)] = rows
        parts = [torch.empty_like(mine) for _ in counts] if self.is_main else None
        with _peers():
            dist.gather(mine, parts)
        if parts is None:
            return rows
        return torch.cat([part[:n] for part, n in zip(parts[: self.parts], counts[: self.parts], strict=True)])

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of a sequence that is the same in all."""
        return items[self.rank :: self.count]

    def merge(self, part: Sequence[T]) -> list[T]:
        """Put what every process made of its ``share`` back in order; all get all of it."""
        if self.count == 1:
            return list(part)
        parts: list[Any] = [None] * self.count
        with _peers():
            dist.all_gather_object(parts, part)
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def on_main(self, work: Callable[[], T]) -> T:
        """Do work in the main process only, the others waiting for it, and return its result in all."""
        if self.count == 1:
            return work()
        box: list[Any] = [work() if self.is_main else None]
        with _peers():
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def alike(self, work: Callable[[], T]) -> T:
        """Do work in every process; what kdctl raises in one of them on purpose is raised in all."""
        result, error = None, None
        try:
            result = work()
        except KdctlError as found:
            error = found
        for found in self.merge([error]):
            if found is not None:
                raise found
        return cast(T, result)

    def on_models(self, work: Callable[[], T]) -> T:
        """Do work with models in the main process, or in all where they are divided; its results are equal then."""
        if not self.sharded:
            return self.on_main(work)
        with passes():
            found = work()
        return self.on_main(lambda: found)

    def main_first(self, work: Callable[[], T]) -> T:
        """Do work in every process, the main one before the others: it fills a cache for them."""
        if self.is_main:
            result = work()
            self.wait()
            return result
        self.wait()
        return work()

    def beside(self) -> dist.ProcessGroup | None:
        """Return a second group of all processes, in which threads talk while they train; None for one alone."""
        if self.count == 1:
            return None
        with _peers():
            return _second_group()

    def passing(self, work: Callable[[], T]) -> T:
        """Do work with models that fills a cache: the main process before the others, or all where models are divided.

        Where they are, the work itself sees to it that only one of them writes.
        """
        return work() if self.sharded else self.main_first(work)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.total(0.0)

    def total(self, value: float) -> float:
        """Sum a number over the processes, in float64."""
        if self.count == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        with _peers():
            dist.all_reduce(box)
        return box.item()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, added in float32 and kept in the tensor's dtype."""
        if self.count == 1:
            return
        for part in pieces(tensors):
            flat = torch.cat([tensor.flatten().float() for tensor in part])
            with _peers():
                dist.all_reduce(flat)
            for tensor, summed in zip(part, flat.split([t.numel() for t in part]), strict=True):
                tensor.copy_(summed.view_as(tensor))


ALONE = Processes()


def connect(device: str) -> Processes:
    """Join the processes that a launcher started with this one. device: ``cpu``, ``cuda`` or ``auto``.

    Raises PresetError for a launch that shards models in another way than FSDP2, or with more processes than GPUs on a
    machine.
    """
    sharded = _asks_for_shards()
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        return ALONE
    copies = _copies(sharded, count)
    cpu = device == "cpu" or not torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and local > torch.cuda.device_count():
        raise PresetError(
            f"{local} processes were launched on a machine with {torch.cuda.device_count()} visible GPU(s), and each "
            "needs one of its own; launch fewer, or set runtime.device=cpu"
        )
    # Objects and waits go through gloo also on GPUs: it sees a closed connection, and waiting keeps no GPU busy.
    backend = {} if cpu else {"backend": "cpu:gloo,cuda:nccl"}
    with passes():
        state = PartialState(cpu=cpu, timeout=LONGEST_WAIT, **backend)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # the command line listens itself
        signal.signal(signal.SIGTERM, _stopped)
    freed = _says("FSDP_RESHARD_AFTER_FORWARD", "true")
    return Processes(state.process_index, state.num_processes, sharded, freed, copies)


def _asks_for_shards() -> bool:
    """Tell whether accelerate's configuration asks for FSDP2. Raises PresetError where it asks for what is not here."""
    fsdp = _says("ACCELERATE_USE_FSDP")
    others = [what for variable, what in OTHER_SHARDING.items() if _says(variable)]
    others += ["FSDP version 1"] * (fsdp and os.environ.get("FSDP_VERSION", "1") != "2")
    others += ["parameters kept in CPU memory"] * (fsdp and _says("FSDP_OFFLOAD_PARAMS"))
    if others:
        raise PresetError(
            f"the accelerate configuration asks for {others[0]}, which kdctl does not have: it trains whole copies "
            "(--multi_gpu) or row shards (--use_fsdp --fsdp_version 2 --fsdp_offload_params false)"
        )
    return fsdp


def _copies(sharded: bool, count: int) -> int:
    """Return how many copies of divided models accelerate's configuration asks for.

    Raises PresetError where it asks for what is not here, or the processes are not as many as it says.
    """
    if not _says("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    sizes = {
        name: int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1"))
        for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    }
    copies, parts = sizes.pop("DP_REPLICATE"), sizes.pop("DP_SHARD")
    if others := [name.lower() for name, size in sizes.items() if size != 1]:
        raise PresetError(f"the accelerate configuration asks for {others[0]}, which kdctl does not have; leave it out")
    if parts > 1 and not sharded:
        raise PresetError(
            "the accelerate configuration has a dp_shard_size and no FSDP; add --use_fsdp --fsdp_version 2"
        )
    if copies < 1 or copies * parts != count:
        raise PresetError(
            f"dp_replicate_size={copies} copies of models, each divided by dp_shard_size={parts} processes, are "
            f"{copies * parts} processes, and {count} were started; change one of the three"
        )
    return copies if sharded else 1


def _says(variable: str, default: str = "false") -> bool:
    return os.environ.get(variable, default).lower() == "true"


def is_divided(model: nn.Module) -> bool:
    """Tell whether processes divide a model's weights, so that all must run it alike."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def parameters_on_meta() -> AbstractContextManager[None]:
    """Build networks, in a block, whose parameters have no memory; buffers, which a network computes itself, do."""
    return init_empty_weights(include_buffers=False)


def started_too_few() -> bool:
    """Tell whether ``accelerate launch`` was asked for several processes and started this one only.

    It does so without ``--multi_gpu`` where it sees no second GPU; it then sets an address and no number of processes.
    """
    return {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ


def leave() -> None:
    """Part from the other processes, after everything is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_report() -> bool:
    """Tell whether this process is the first of all that has an error to show; what follows it is noise.

    Raises OSError where nobody can tell: without a launcher it is the main process that keeps the store.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket.create_connection((host, port), timeout=1).close()  # torch would try for long, and say so at length
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5)).add("kdctl/reported", 1) == 1
    except RuntimeError:
        return True  # where the launcher's store is gone, two messages are better than none


@cache
def _second_group() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=LONGEST_WAIT))


@contextmanager
def passes() -> Iterator[None]:
    """Say what it means when what libraries do between processes fails because another one has ended."""
    try:
        yield
    except ProcessError:
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            raise _ended(error) from error
        raise


@contextmanager
def _peers() -> Iterator[None]:
    """Say what it means when talking to the others fails."""
    try:
        yield
    except RuntimeError as error:
        raise _ended(error) from error


def _ended(error: RuntimeError) -> ProcessError:
    return ProcessError(
        "another process of this run has ended, so this one cannot go on "
        f"({str(error).splitlines()[0]}); what was finished is on disk, and the same command goes on from there, "
        "with any number of processes"
    )


def pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors, in order, into parts of about ``PIECE`` numbers."""
    part: list[Tensor] = []
    for tensor in tensors:
        if part and sum(t.numel() for t in part) + tensor.numel() > PIECE:
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part


def _stopped(*_: object) -> NoReturn:
    """End like Ctrl-C does, so that nothing is left half-written."""
    raise KeyboardInterrupt("stopped by the launcher, as it does when another process of this run has ended")
