"""What a run will take before anything runs: memory by phase, disk, tokens and, at given rates, seconds.

Everything follows from the preset and from what ``footprint`` sees of the network. Sizes are those of the tensors that
the code makes; sequences are taken to be as long as the preset allows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch

from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.cost.duration import make_timing
from kdctl.cost.estimate import Cost, as_parts
from kdctl.cost.network import Network
from kdctl.cost.records import Advice, CostPlan, Pace, Phase, Rates, Room
from kdctl.model.load import pick_device
from kdctl.run.paths import RunDir, disk_of
from kdctl.run.tracking import read_metrics
from kdctl.system.distributed import Processes
from kdctl.system.memory import machine_bytes

HELPS = 0.99
"""A setting is advised where it lowers the peak to this share or less: what saves a few bytes changes a run in vain."""


@dataclass(frozen=True)
class Machine:
    """Where a run is to fit. memory_name: "RAM" or "GPU memory", the one that is counted."""

    memory_name: str
    memory_bytes: int
    disk_bytes: int

    @property
    def cpu(self) -> bool:
        """Tell whether RAM is what counts."""
        return self.memory_name == "RAM"


def find_machine(device: str, folder: Path, memory_gib: float | None) -> Machine:
    """Look at this machine, or at the device that a preset names with other memory.

    Raises ModelError if CUDA is asked for, there is none here and no memory is named.
    """
    _, disk = disk_of(folder)
    if memory_gib is not None:
        return Machine("RAM" if device == "cpu" else "GPU memory", int(memory_gib * 2**30), disk)
    found = pick_device(device)
    if found.type == "cpu":
        return Machine("RAM", machine_bytes(), disk)
    return Machine("GPU memory", torch.cuda.get_device_properties(found).total_memory, disk)


def check_processes(preset: Preset, shards: int, copies: int) -> None:
    """Raise PresetError if so many processes cannot train as the preset says."""
    Processes(0, shards * copies, sharded=shards > 1).check_trainable(preset.distill)


def make_plan(
    preset: Preset,
    network: Network,
    machine: Machine,
    run: RunDir,
    shards: int = 1,
    copies: int = 1,
    rates: Rates | None = None,
) -> CostPlan:
    """Work out what a run of a preset takes, and what to change where it does not fit.

    Steps that were measured in the run folder take the place of computed ones where no rates are named. Raises
    PresetError if so many shards or copies cannot train as the preset says.
    """
    check_processes(preset, shards, copies)
    cost = Cost(preset, network, machine.cpu, shards, copies, machine.memory_bytes)
    pace = measured_pace(run)
    phases, disk = cost.phases(), as_parts(cost.disk())
    peak, sequences = peak_bytes(phases), preset.distill.steps * preset.distill.rows_per_step
    memory = Room(name=machine.memory_name, needed_bytes=peak, there_bytes=machine.memory_bytes)
    if not memory.fits:
        memory = memory.model_copy(update={"advice": tuple(advice(preset, network, machine, shards, copies))})
    needed = sum(part.size_bytes for part in disk)
    return CostPlan(
        quantized_parameters=network.quantized_parameters,
        other_parameters=network.other_parameters,
        trained_parameters=cost.trained,
        phases=phases,
        memory=memory,
        checkpoint_copy_bytes=cost.checkpoint,
        disk_parts=disk,
        disk=Room(name="disk", needed_bytes=needed, there_bytes=machine.disk_bytes),
        generated_tokens=cost.generated(),
        trained_sequences=sequences,
        trained_tokens=sequences * cost.longest,
        pace=pace,
        timing=make_timing(cost, rates, pace if rates is None and shards == copies == 1 else None),
    )


def peak_bytes(phases: tuple[Phase, ...]) -> int:
    """Return the most memory at any time."""
    return max(phase.peak_bytes for phase in phases)


def advice(preset: Preset, network: Network, machine: Machine, shards: int = 1, copies: int = 1) -> Iterator[Advice]:
    """Yield settings that lower the peak, each alone and then all together where that lowers it further."""
    rows = preset.distill.rows_per_step
    candidates: list[dict[str, object]] = [
        {"runtime.activation_checkpointing": "full"},
        {"distill.micro_batch_size": 1, "distill.gradient_accumulation": rows},
        *([{"distill.optimizer": "adafactor"}] if shards == 1 else []),  # FSDP2 divides AdamW's moments alone
        {"distill.train": "lora", "distill.learn_scales": False},
        {"rollout.batch_size": 8},
    ]

    def peak_with(settings: dict[str, object]) -> int:
        changed = build_preset(preset.model_dump(), settings, "advice")
        return peak_bytes(Cost(changed, network, machine.cpu, shards, copies, machine.memory_bytes).phases())

    best, together = peak_with({}), {}
    lowest = best
    for settings in candidates:
        peak = peak_with(settings)
        if peak < HELPS * best:
            together, lowest = together | settings, min(lowest, peak)
            yield _advice(preset, settings, peak)
    if together and (peak := peak_with(together)) < lowest:
        yield _advice(preset, together, peak)


def _advice(preset: Preset, settings: dict[str, object], peak: int) -> Advice:
    """Name the settings that differ from the preset's."""
    tree = preset.model_dump()
    named = [f"{key}={value}" for key, value in settings.items() if _field(tree, key) != value]
    return Advice(settings=tuple(named), peak_bytes=peak)


def _field(tree: dict[str, dict[str, object]], key: str) -> object:
    section, _, name = key.partition(".")
    return tree[section][name]


def measured_pace(run: RunDir) -> Pace | None:
    """Read how long a step took in the variant that was trained last in a run folder, if there is one."""
    found = sorted(run.distill_root.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    seconds = [line["time/step_s"] for line in read_metrics(found[-1])] if found else []
    if not seconds:
        return None
    name = found[-1].parent.name
    return Pace(
        variant=name, steps=len(seconds), step_seconds_median_s=median(seconds), step_seconds_mean_s=mean(seconds)
    )
