"""Statistics on per-item results: intervals, paired comparisons, verdicts. Pure numpy and scipy (layer 1)."""

from kdctl.stats.bootstrap import exponential, ratio, removed

__all__ = ["exponential", "ratio", "removed"]
