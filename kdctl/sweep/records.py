"""Trials and sweeps as typed records (no torch)."""

from typing import Literal

from kdctl.run.records import Record


class TrialRecord(Record):
    """One trial of a sweep."""

    number: int
    """Its place in the sweep, from 0."""
    values: dict[str, object]
    """The swept fields; empty where they are not chosen yet."""
    status: Literal["waiting", "running", "complete", "stopped", "failed"]
    variant: str | None = None
    metric: float | None = None
    step: int = 0
    steps: int = 0
    seconds_s: float | None = None
    """Complete trials only: from the first start to the end, evaluation included."""
    left_s: float | None = None
    """Running trials only: estimated seconds of training left, where a step was timed."""


class SweepReport(Record):
    """What ``kdctl sweep`` prints: every trial, and the best."""

    sweep: str
    folder: str
    metric: str
    goal: Literal["minimize", "maximize"]
    trials: tuple[TrialRecord, ...]
    best: str | None = None
    """Variant of the best trial."""
