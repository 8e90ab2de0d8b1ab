"""What a run will take, as typed records (no torch)."""

from kdctl.run.records import Record


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
