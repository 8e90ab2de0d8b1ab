"""Statistics on per-item results: intervals, paired comparisons, verdicts (layer 1: no torch, no files)."""

from kdctl.stats.bootstrap import exponential, ratio, ratio_difference, removed
from kdctl.stats.proportions import accuracy

__all__ = [
    "accuracy",
    "exponential",
    "ratio",
    "ratio_difference",
    "removed",
]
