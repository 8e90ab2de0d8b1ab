"""What a run will take, as typed records (no torch)."""

from typing import Literal

from kdctl.config.section import Name, Positive
from kdctl.run.records import Record

Limit = Literal["products", "memory", "operators", "network", "disk", "measured"]
"""What decides how long something takes; "measured" where that was seen in the run folder."""


class Part(Record):
    """Something that takes room."""

    name: str
    size_bytes: int


class Phase(Record):
    """One stretch of a run: what stays in memory through all of it, and moments that follow each other."""

    name: str
    parts: tuple[Part, ...]
    moments: tuple[Part, ...]
    peak_bytes: int
    """All parts and the largest moment."""


class Advice(Record):
    """Settings that make a run smaller, and its peak with them."""

    settings: tuple[str, ...]
    peak_bytes: int


class Room(Record):
    """What is needed of what there is."""

    name: str
    needed_bytes: int
    there_bytes: int
    advice: tuple[Advice, ...] = ()
    """Where it does not fit: what would make it smaller, each alone and, last, all together."""

    @property
    def fits(self) -> bool:
        """Tell whether there is enough."""
        return self.needed_bytes <= self.there_bytes


class Pace(Record):
    """How long a training step took in this run folder."""

    variant: str
    steps: int
    step_seconds_median_s: float
    step_seconds_mean_s: float
    """With what was generated for it."""


class Rates(Record):
    """How fast a machine is. What it is asked for in one go takes as long as its slowest part."""

    name: Name
    measured: bool
    """By `benchmarks/rates.py`; else these are a vendor's or a user's figures, and the shares assumptions."""
    products_per_s: Positive
    """Floating-point operations a second of matrix products in the model's dtype, at best."""
    reached: Positive
    """Share of them that whole passes reach."""
    memory_bytes_per_s: Positive
    memory_reached: Positive = 1.0
    """Share of it that is reached."""
    operator_s: Positive
    """Seconds to start one operator from Python."""
    network_bytes_per_s: Positive
    """From one process to another, each way."""
    between_bytes_per_s: Positive | None = None
    """The same between copies of divided models, if that is slower."""
    disk_bytes_per_s: Positive


class Stretch(Record):
    """How long one kind of work takes in the whole run."""

    name: str
    seconds_s: float
    limit: Limit
    """What decides most of it."""
    parts_s: dict[Limit, float]
    """Its seconds by what decides them."""


class Timing(Record):
    """How long a run takes, sequences being as long as the preset allows."""

    rates: Rates | None
    """None where the only seconds are those measured in the run folder."""
    stretches: tuple[Stretch, ...]
    step_s: float
    """A training step, without what is generated for it; where it was measured, with that."""
    total_s: float
    left_out: tuple[str, ...]
    """What the run does beside that."""


class CostPlan(Record):
    """What a run will take, worked out from its preset and the network's configuration."""

    quantized_parameters: int
    other_parameters: int
    trained_parameters: int
    phases: tuple[Phase, ...]
    memory: Room
    checkpoint_copy_bytes: int
    """RAM for a copy of what a checkpoint holds; on a CPU training waits for a checkpoint where that is not free."""
    disk_parts: tuple[Part, ...]
    disk: Room
    generated_tokens: dict[str, int]
    """At most, by who writes them."""
    trained_sequences: int
    trained_tokens: int
    """At most, prompts and completions."""
    pace: Pace | None = None
    """Only where the run folder has measured steps."""
    timing: Timing | None = None
    """Only where rates are named, or the run folder has measured steps."""
