"""From an interval to a verdict in words."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import root_scalar

from kdctl.base.errors import DataError
from kdctl.run.measures import ScoreUnit
from kdctl.run.records import Estimate
from kdctl.stats.bootstrap import LEVEL
from kdctl.stats.findings import Verdict
from kdctl.stats.groups import quantile

MARGIN = 0.005
POWER = 0.8
EQUIVALENCE_LEVEL = 0.90  # two one-sided tests at 5 % are a 90 % interval inside the margin (Schuirmann 1987)
SMALLEST_P, LARGEST_P = 1e-12, 0.999


def p_value(interval: Callable[[float], Estimate]) -> float:
    """Return the two-sided p of no difference: 1 minus the level whose interval ends at 0.

    ``interval`` maps a level to an interval around one value. Of a score interval it is the score test's p.
    """
    value = interval(LEVEL).value

    def beyond(log_p: float) -> float:
        at = interval(1 - float(np.exp(log_p)))
        return at.low if value > 0 else -at.high

    least, most = np.log(SMALLEST_P), np.log(LARGEST_P)
    if value == 0 or beyond(most) <= 0:
        return 1.0
    return float(np.exp(root_scalar(beyond, bracket=(least, most)).root)) if beyond(least) < 0 else SMALLEST_P


def detectable(interval: Estimate) -> float:
    """Return the minimum detectable effect, (z.975 + z.8)·SE, of a 95 % interval, at most 1.

    SE is half the interval's width over z.975 rather than the usual one, so that it is not 0 where all answers are
    equal and carries the t quantile of few groups. It hardly depends on the difference that was observed.
    """
    z = quantile(LEVEL, np.inf)
    standard_error = (interval.high - interval.low) / 2 / z
    return min(1.0, (z + quantile(2 * POWER - 1, np.inf)) * standard_error)


def require_margin(margin: float) -> None:
    """Raise DataError where a margin is not a positive fraction of 1."""
    if not 0 < margin < 1:
        raise DataError(
            f"The equivalence margin is {margin}, but it must lie between 0 and 1, not reaching either: nothing is "
            "equivalent within 0, and everything within 1. Half a point of accuracy is 0.005."
        )


def decide(
    interval: Estimate, inner: Estimate, p: float, margin: float, unit: ScoreUnit = "points"
) -> tuple[Verdict, str]:
    """Choose the verdict on a difference b − a, in accuracy or another mean of what answers are worth, and say it.

    ``inner`` is the 90 % interval. Equivalence goes first: a difference may be both significant and too small to
    matter, and then what matters in practice is that it is small; the words say that it is significant all the same.
    Where neither is shown nothing is claimed: the words give what the comparison could have seen.
    """
    significant, said = p < 1 - LEVEL, SAID[unit]
    if -margin < inner.low and inner.high < margin:
        note = f" (though {said.signed(interval.value)} is a significant difference)" if significant else ""
        return "equivalent", f"equivalent within ±{said.within(margin)}{note}"
    if significant:
        verdict: Verdict = "better" if interval.value > 0 else "worse"
        ends = f"{said.number(interval.low)} to {said.number(interval.high)}"
        return verdict, f"{verdict} by {said.signed(abs(interval.value)).removeprefix('+')} ({ends})"
    limit = said.rough(detectable(interval))
    return "cannot tell", f"cannot tell: this comparison could only see differences above {limit}"


@dataclass(frozen=True)
class _Said:
    """How differences are written."""

    scale: float
    digits: int
    name: str
    rough_digits: int

    def number(self, value: float) -> str:
        return f"{self.scale * value:+.{self.digits}f}"

    def signed(self, value: float) -> str:
        return f"{self.number(value)} {self.name}"

    def within(self, margin: float) -> str:
        return f"{self.scale * margin:g} {self.name}"

    def rough(self, value: float) -> str:
        return f"{self.scale * value:.{self.rough_digits}f} {self.name}"


SAID: dict[ScoreUnit, _Said] = {
    "points": _Said(100, 2, "points", 1),
    "probability": _Said(1, 4, "in probability", 3),
}
