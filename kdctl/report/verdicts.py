"""What was found, in plain sentences."""

from kdctl.report.columns import BASELINES, Results
from kdctl.report.contrasts import Row, baseline, differs, per_byte, per_token, per_token_difference
from kdctl.report.details import recovery_of, removed
from kdctl.report.study import Kind
from kdctl.run.measures import FORWARD_KL, fixed
from kdctl.run.records import Estimate

PHRASES: dict[Kind, str] = {"ptq": "the PTQ student", "teacher": "the teacher"}


def sentences(results: Results) -> list[str]:
    """Say of every student what its accuracies and its distance to the teacher show; one paragraph each."""
    paragraphs = []
    for row in results.rows:
        if row.kind == "teacher":
            continue
        parts = (_accuracies(results, row), _rolling(results, row), _distance(results, row), _recovered(results, row))
        said = [text for text in parts if text]
        if said:
            paragraphs.append(f"**{row.name}**: " + " ".join(said))
    return paragraphs


def _accuracies(results: Results, row: Row) -> str:
    """Give the verdict against each baseline, and the single tasks that differ."""
    missing = [model.name for model in row.models if not model.scores]
    if missing and len(missing) < len(row.models):
        return f"Nothing is said of tasks, because not all seeds were evaluated: {', '.join(missing)} (kdctl eval)."
    if not all(model.tasks for model in row.models):
        return "Not evaluated on any task yet (--task names some)."
    if not results.tasks or missing:
        return ""
    said = []
    for kind in BASELINES:
        base = baseline(results.study, results.all_rows, row, kind)
        if base is None:
            continue
        judged = results.judged(row, kind, results.tasks)
        if judged is None:
            missing = [task for task in results.tasks if row.answers(task) is None or base.answers(task) is None]
            said.append(
                f"against {PHRASES[kind]}, nothing can be concluded, without per-item results of {', '.join(missing)}"
            )
            continue
        said.append(f"against {PHRASES[kind]}, {judged.words}{_single(results, row, kind)}")
    if not said:
        return "Neither the PTQ student nor the teacher was evaluated, so there is nothing to compare it with."
    where = (
        f"On the average of {len(results.tasks)} tasks" if len(results.tasks) > 1 else f"On {', '.join(results.tasks)}"
    )
    return f"{where}, {'; '.join(said)}."


def _single(results: Results, row: Row, kind: Kind) -> str:
    """Name the tasks on which a row differs after correction."""
    found = [(task, results.single.get((row.name, kind, task))) for task in results.tasks]
    named = [f"{one.verdict} on {task}" for task, one in found if one and one.verdict in ("better", "worse")]
    return f" (single tasks: {', '.join(named)})" if named else ""


def _rolling(results: Results, row: Row) -> str:
    """Give bits per byte of whole documents and how they differ from each baseline's."""
    said = []
    for task in results.rolling:
        if (found := per_byte(row, task)) is None:
            continue
        told = ""
        for kind in BASELINES:
            base = baseline(results.study, results.all_rows, row, kind)
            difference = per_byte(row, task, base) if base else None
            told += _told(PHRASES[kind], difference) if difference else ""
        said.append(f"Documents of {task} cost {_interval(found)} bits a byte{told}.")
    return " ".join(said)


def _told(whose: str, difference: Estimate) -> str:
    if not difference.bounded:
        return f", which one document does not tell from {whose}'s"
    if not differs(difference):
        low, high = fixed(difference.low, 4, "+"), fixed(difference.high, 4, "+")
        return f", not distinguishable from {whose}'s (difference {fixed(difference.value, 4, '+')} [{low}, {high}])"
    more, which = ("less", "better") if difference.value < 0 else ("more", "worse")
    return f", {fixed(abs(difference.value), 4)} {more} than {whose}'s ({_width(difference)}), which is {which}"


def _width(difference: Estimate) -> str:
    """Give the ends of a difference that leaves out 0, without the sign that the words beside it say."""
    least, most = sorted((abs(difference.low), abs(difference.high)))
    return f"{fixed(least, 4)} to {fixed(most, 4)}"


def _distance(results: Results, row: Row) -> str:
    """Give the KL to the teacher and how it differs from the PTQ student's."""
    found = per_token(row, FORWARD_KL)
    if found is None:
        return ""
    text = f"KL to the teacher is {_interval(found)} nats a token"
    base = baseline(results.study, results.all_rows, row, "ptq")
    difference = per_token_difference(base, row, FORWARD_KL) if base else None
    share = removed(base, row) if base else None
    if difference is None or share is None:
        return text + "."
    if difference.low <= 0 <= difference.high:
        return text + f", not distinguishable from the PTQ student's (difference {_interval(difference)})."
    verb = "less" if difference.value < 0 else "more"
    text += f", {fixed(abs(difference.value), 4)} {verb} than the PTQ student's ({_width(difference)})"
    if difference.value > 0:
        return text + "."
    return text + f": {100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}] of it was removed."


def _recovered(results: Results, row: Row) -> str:
    """Give the share of lost accuracy that came back, or say why there is none."""
    if row.kind not in ("variant", "foreign") or len(row.models) > 1:
        return ""
    found = recovery_of(results, row, results.tasks)
    if found is None:
        return ""
    if found.estimate is None:
        return f"No share of recovered accuracy is given: {found.reason}."
    low, high = 100 * found.estimate.low, 100 * found.estimate.high
    return (
        f"Of the accuracy that quantization lost, {100 * found.estimate.value:.0f} % [{low:.0f}, {high:.0f}] came back."
    )


def _interval(found: Estimate) -> str:
    if not found.bounded:
        return f"{fixed(found.value, 4)} (one document has no interval)"
    return f"{fixed(found.value, 4)} [{fixed(found.low, 4)}, {fixed(found.high, 4)}]"
