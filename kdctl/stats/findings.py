"""What the statistics found, as typed records.

Accuracies and their differences are fractions of 1; only ``words`` speak of points, hundredths of 1.
"""

from typing import Literal

from kdctl.run.records import Estimate, Record

Verdict = Literal["better", "worse", "equivalent", "cannot tell"]


class Accuracy(Record):
    """Share of right answers with its uncertainty as a sample of the benchmark's items."""

    estimate: Estimate
    standard_error: float | None
    """None where all items are one group, which says nothing of others."""
    items: int
    groups: int
    """Clusters that items come in; as many as items where items are independent."""


class Finding(Record):
    """A difference b − a in accuracy and what may be said of it."""

    difference: Estimate
    standard_error: float | None
    """None where it cannot be estimated: all items of a task are one group."""
    p: float
    """Two-sided, of no difference, not below 1e-12; what the verdict and a correction for several comparisons use."""
    margin: float
    """Differences up to this are of no practical weight."""
    mde: float
    """Minimum detectable effect: the true difference that this comparison sees with 80 % power at two-sided 5 %."""
    items: int
    verdict: Verdict
    words: str


class Comparison(Finding):
    """Two models on the same items, or the average of several tasks."""

    bootstrap: Estimate
    p_mcnemar: float
    """Exact McNemar p of all flips pooled; items taken as independent."""
    harmful: int
    """Items that a has right and b wrong."""
    beneficial: int
    """Items that a has wrong and b right."""
    flip_rate: float
    """Share of items that only one of the two has right."""
    groups: int


class SeedSpread(Record):
    """Several seeds of one setting on the same items: where the variation comes from."""

    accuracy: Estimate
    standard_error: float | None
    seeds: int
    items: int
    seed_variance: float | None
    """σ² between seeds; None (unknown, not 0) with one seed, when ``accuracy`` is an interval over items only."""
    item_variance: float | None
    """σ² between items; None with one seed, which cannot tell it from the residual."""
    residual_variance: float | None
    """σ² of an item's answer over seeds, beyond the two others."""
    clipped: tuple[Literal["seed", "item"], ...]
    """Components whose estimates were negative and are reported as 0."""


class SeedComparison(Finding):
    """Two settings, each with one or more seeds, on the same items."""

    seeds: tuple[int, int]
    seed_variances: tuple[float | None, float | None]
    """σ² between the seeds of a and of b; None where one seed leaves it unknown."""


class Recovery(Record):
    """(student − PTQ) / (teacher − PTQ): the share of what quantization lost that came back."""

    estimate: Estimate | None
    """Fieller interval; None where the gap is itself within noise, for ``reason``."""
    bootstrap: Estimate | None
    """Percentile bootstrap; None too where a resample closes the gap and so has no ratio."""
    reason: str | None
    gap: Comparison
    """The teacher against the PTQ student."""
