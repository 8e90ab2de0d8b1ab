"""What there is to win before training starts: how far the PTQ student is from the teacher."""

import numpy as np

from kdctl import stats
from kdctl.base.errors import TrainingError
from kdctl.eval import distribution
from kdctl.model.folder import fingerprint
from kdctl.model.teacher import Teacher
from kdctl.report.samples import read_items
from kdctl.run.documents import PerDocument
from kdctl.run.measures import fixed
from kdctl.run.paths import RunDir
from kdctl.run.record_files import read_record
from kdctl.run.records import DistributionMetrics, EvalResult
from kdctl.stages.context import Context
from kdctl.stats import Paired
from kdctl.stats.findings import Comparison

KL_NOISE = 1e-3
"""Nats a token: about what bfloat16 instead of float32 makes of equal weights, 0.0013 for SmolLM2-135M."""


def check_gap(context: Context, teacher: Teacher, before: PerDocument, min_gap: float) -> None:
    """Say what the PTQ student lost, and warn if that is within noise.

    Raises TrainingError if its KL to the teacher is 0, or the lower end of its interval below ``min_gap``, nats a
    token: training starts only where the gap is surely as large as asked for.
    """
    found, accuracy = distribution.summarize(before), accuracy_gap(context, teacher)
    for line in gap_lines(found, accuracy):
        context.reporter.note(line)
    kl = found.forward_kl
    if not kl.value > 0:
        raise TrainingError(
            f"the PTQ student's KL to the teacher is {kl.value:.4g} nats a token: its predictions are the teacher's, "
            "and there is nothing to win by training. Quantize to fewer bits, or use the student as it is"
        )
    if kl.low < min_gap:
        raise TrainingError(
            f"the PTQ student's KL to the teacher is {kl.value:.4g} nats a token, 95 % interval {kl.low:.4g} to "
            f"{kl.high:.4g}, and --min-gap {min_gap:g} asks for a lower end of at least that; training could win so "
            "little that it may not be worth its time. Lower --min-gap, or quantize to fewer bits"
        )


def gap_lines(found: DistributionMetrics, accuracy: Comparison | None) -> list[str]:
    """Put the gap and what may be won at most in words, with warnings where it is within noise."""
    kl, perplexity = found.forward_kl, found.perplexity.value
    lines = [
        f"PTQ gap: KL to the teacher {kl.value:.4g} [{kl.low:.4g}, {kl.high:.4g}] nats a token, all there is to win; "
        f"with it held-out perplexity would go from {fixed(perplexity, 2)} to {fixed(found.teacher_perplexity, 2)}"
    ]
    if kl.low <= KL_NOISE:
        lines.append(f"warning: this KL is within noise: bfloat16 arithmetic alone makes about {KL_NOISE:g}")
    if accuracy is not None:
        gap = accuracy.difference
        points = f"{100 * gap.value:+.2f} [{100 * gap.low:+.2f}, {100 * gap.high:+.2f}]"
        lines.append(f"PTQ gap: teacher − ptq {points} points of accuracy on {accuracy.items} items")
        if accuracy.p >= 1 - stats.LEVEL:
            lines.append(
                "warning: the accuracy gap is within noise, and so would be a share of it that training wins back; "
                f"these tasks show gaps from {100 * accuracy.mde:.1f} points on. Look at KL, or evaluate on more items"
            )
    return lines


def accuracy_gap(context: Context, teacher: Teacher) -> Comparison | None:
    """Compare the teacher with the PTQ student, as a difference teacher − ptq on the average of their common tasks.

    None where there are no results of both on the present weights, or no task of both.
    """
    original = _results(context.paths, "teacher", teacher.fingerprint())
    ptq = _results(context.paths, "ptq", fingerprint(context.paths.student))
    if original is None or ptq is None:
        return None
    common = [name for name in ptq.tasks if name in original.tasks]
    pairs = {name: _paired(context.paths, name, ptq, original) for name in common}
    known = {name: pair for name, pair in pairs.items() if pair is not None}
    return stats.compare_average(known) if known else None


def _results(run: RunDir, model: str, weights: str) -> EvalResult | None:
    path = run.results(model)
    found = read_record(path, EvalResult) if path.exists() else None
    return found if found is not None and found.weights == weights else None


def _paired(run: RunDir, task: str, ptq_said: EvalResult, teacher_said: EvalResult) -> Paired | None:
    """Read the items of a task that both models answered; None where those of one are not kept, or are graded."""
    metric, said = ptq_said.tasks[task].metric, {"ptq": ptq_said, "teacher": teacher_said}
    ptq, teacher = (read_items(run.samples(name, task), metric, result.samples) for name, result in said.items())
    if ptq is None or teacher is None or ptq.values.dtype != np.bool_ or teacher.values.dtype != np.bool_:
        return None  # accuracy is of answers that are right or wrong
    _, own, theirs = np.intersect1d(ptq.ids, teacher.ids, return_indices=True)
    return Paired(ptq.values[own], teacher.values[theirs], None if ptq.clusters is None else ptq.clusters[own])
