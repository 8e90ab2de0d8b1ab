"""What more minutes would bring to a PTQ student, by what they brought where it was measured."""

from itertools import pairwise

from kdctl.run.measures import fixed
from kdctl.run.records import QuantizeReport
from kdctl.stages.gate import KL_NOISE

MEASURED_ON = "SmolLM2-135M at 4 bits"
LEFT = {"minmax": 0.403, "hqq": 0.406, "autoround": 0.129, "gptq": 0.126, "kl": 0.084}
"""Held-out KL of each method's student there, nats a token, on 240 or 256 sequences."""
BEST = "kl"
SEQUENCE_S = 171 / 240
"""Seconds of ``kl`` a calibration sequence there; training's pace goes with it from machine to machine."""
CURVE = ((0.0, 0.0), (1.9, 0.033), (5.6, 0.054), (11.0, 0.076), (16.5, 0.086), (27.5, 0.087))
"""Minutes of training after ``kl`` there, with their rollouts, and the share of held-out KL that they removed: of
scales and norms up to the sixth minute, of all weights on more text beyond it."""
ASKED = (5, 60)
LITTLE = 0.01


def outlook(report: QuantizeReport, sequences: int) -> str:
    """Say what is worth doing after ``kdctl quantize``, which calibrated on so many sequences if at all."""
    kl, method = report.distribution.forward_kl, report.method
    if kl.value <= KL_NOISE:
        return f"next: nothing; bfloat16 arithmetic alone makes a KL of {KL_NOISE:g}"
    if method != BEST:
        known = f" where {method} left {LEFT[method]:.3f}" if method in LEFT else ""
        return f"next: --method {BEST} before any training; on {MEASURED_ON} it left a KL of {LEFT[BEST]:.3f}{known}"
    pace = report.seconds_s / sequences / SEQUENCE_S
    shares = [removed(minutes / pace) for minutes in ASKED]
    beyond = " or less" if ASKED[-1] / pace > CURVE[-1][0] else ""
    if shares[-1] < LITTLE:
        few = f"next: an hour of training would remove less than {LITTLE:.0%} of this KL"
        return f"{few}; plan hours of it, or use the student as it is"
    expected = " and ".join(
        f"{minutes} minutes of it to about {fixed(kl.value * (1 - share), 4)} (−{share:.0%})"
        for minutes, share in zip(ASKED, shares, strict=True)
    )
    return f"next: kdctl distill; if this model is like {MEASURED_ON}, {expected}{beyond}, rollouts included"


def removed(minutes: float) -> float:
    """Read the curve: the share of KL that so many minutes removed, of more than were measured what those did."""
    for (start, low), (end, high) in pairwise(CURVE):
        if minutes <= end:
            return low + (high - low) * (minutes - start) / (end - start)
    return CURVE[-1][1]
