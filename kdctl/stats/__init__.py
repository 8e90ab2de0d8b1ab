"""Statistics on per-item results: intervals, paired comparisons, verdicts (no torch, no files)."""

from kdctl.stats.bootstrap import LEVEL, exponential, ratio, ratio_difference, removed
from kdctl.stats.comparisons import Paired, compare, compare_average, holm
from kdctl.stats.gaps import Trio, recovery, recovery_average
from kdctl.stats.proportions import accuracy
from kdctl.stats.ratios import Ratio, average_ratio
from kdctl.stats.repeats import Repeated, average_seeds, compare_seeds, compare_seeds_average, seeds, widen

__all__ = [
    "LEVEL",
    "Paired",
    "Ratio",
    "Repeated",
    "Trio",
    "accuracy",
    "average_ratio",
    "average_seeds",
    "compare",
    "compare_average",
    "compare_seeds",
    "compare_seeds_average",
    "exponential",
    "holm",
    "ratio",
    "ratio_difference",
    "recovery",
    "recovery_average",
    "removed",
    "seeds",
    "widen",
]
