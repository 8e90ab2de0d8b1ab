"""How fast the machine is that a plan is for: measured, a vendor's figures, or those that a user names."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from kdctl.base.errors import PresetError
from kdctl.config.resolve import suggest
from kdctl.cost.records import Rates
from kdctl.run.files import read_bytes
from kdctl.run.record_files import first_problem

REACHED = 0.45
"""Share of a vendor's dense products that whole passes are assumed to reach: what is asked of them, not measured."""
MEMORY_REACHED = 0.7
"""Share of a vendor's memory bandwidth that is assumed to be reached."""
OPERATOR_S = 7e-6
"""Seconds that Python and the driver are assumed to take for one operator on a GPU."""
ON_ONE_MACHINE = 8
"""GPUs that one machine is assumed to have."""
BETWEEN_MACHINES = 50e9
"""Bytes a second for each GPU between machines: a port of 400 Gbit/s, an assumption."""
DISK = 1e9
"""Bytes a second that a disk is assumed to take."""


@dataclass(frozen=True)
class Accelerator:
    """A vendor's figures: dense bf16 products in 10¹² a second, GB/s of memory and of the link one way.

    memory_gib: GiB that a process finds there.
    """

    tflops: float
    bandwidth: float
    link: float
    memory_gib: float


ACCELERATORS = {
    "a100": Accelerator(312, 2039, 300, 79),
    "h100": Accelerator(989, 3350, 450, 79),
    "h200": Accelerator(989, 4800, 450, 139),
    "b200": Accelerator(2250, 7700, 900, 178),
    "l40s": Accelerator(362, 864, 32, 44),
    "rtx4090": Accelerator(165, 1008, 32, 24),
}
"""Data sheets of NVIDIA: SXM modules where there are some; without sparsity."""


def accelerator(name: str) -> Accelerator:
    """Return a row of ``ACCELERATORS``. Raises PresetError for an unknown name."""
    if name.lower() not in ACCELERATORS:
        raise PresetError(
            f"--gpu {name:.100}: no such accelerator in kdctl's table{suggest(name.lower(), ACCELERATORS)}; there are "
            f"{', '.join(ACCELERATORS)}. Name the figures of another one with --tflops, --bandwidth and --memory"
        )
    return ACCELERATORS[name.lower()]


def read_rates(path: Path) -> Rates:
    """Read what ``benchmarks/rates.py`` printed. Raises PresetError for a file that is not such a record."""
    try:
        return Rates.model_validate_json(read_bytes(path))
    except OSError as error:
        raise PresetError(f"--rates {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise PresetError(
            f"--rates {path} is no record of rates: {first_problem(error)}; python benchmarks/rates.py prints one"
        ) from None


def find_rates(
    path: Path | None,
    gpu: str | None,
    tflops: float | None,
    bandwidth: float | None,
    link: float | None,
    shards: int,
    copies: int = 1,
) -> Rates | None:
    """Put together the rates that a user names: a file, an accelerator, figures, or an accelerator with other figures.

    tflops: 10¹² operations a second; bandwidth, link: GB/s. shards, copies: GPUs that divide a model, and
    groups of them with one each. Returns None where nothing is named; raises PresetError for what names too little or
    two things.
    """
    if path is not None:
        if (gpu, tflops, bandwidth, link) != (None,) * 4:
            raise PresetError("--rates names every figure; leave out --gpu, --tflops, --bandwidth and --link, or it")
        return read_rates(path)
    if gpu is None and tflops is None and bandwidth is None and link is None:
        return None
    row = accelerator(gpu) if gpu else None
    if row is None and (tflops is None or bandwidth is None):
        raise PresetError("without --gpu, seconds follow from --tflops and --bandwidth together; name both")
    near = row.link * 1e9 if row else BETWEEN_MACHINES
    between = near if shards * copies <= ON_ONE_MACHINE else BETWEEN_MACHINES
    within = near if shards <= ON_ONE_MACHINE and shards > 1 else between
    figures = {"tflops": tflops, "bandwidth": bandwidth, "link": link}
    try:
        return Rates(
            name=", ".join([gpu or "", *(f"{name} {value:g}" for name, value in figures.items() if value)]).strip(", "),
            measured=False,
            products_per_s=1e12 * (tflops or (row.tflops if row else 0)),
            reached=REACHED,
            memory_bytes_per_s=1e9 * (bandwidth or (row.bandwidth if row else 0)),
            memory_reached=MEMORY_REACHED,
            operator_s=OPERATOR_S,
            network_bytes_per_s=1e9 * link if link else within,
            between_bytes_per_s=None if link or within == between else between,
            disk_bytes_per_s=DISK,
        )
    except ValidationError as error:
        raise PresetError(f"no machine has these rates: {first_problem(error)}") from None
