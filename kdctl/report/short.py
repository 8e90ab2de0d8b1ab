"""What people compare, at a glance: a table's few columns, and the verdicts in a line each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kdctl.report.columns import AVERAGE, BASELINES, Results
from kdctl.report.contrasts import Judged, Row, baseline, differs, per_byte, per_token_difference
from kdctl.report.details import NAMES, removed
from kdctl.report.study import Kind
from kdctl.report.tables import Block, Cell, Column, Table, without_empty
from kdctl.run.measures import FORWARD_KL, column_measures, fixed

VERDICT = Column("verdict", "verdict")
PHRASES: dict[Kind, str] = {"ptq": "PTQ", "teacher": "the teacher"}
NO_MARKS = "No marks: nothing can be concluded without per-item results of two models."
NO_ITEMS = "no per-item results"


@dataclass(frozen=True)
class Headline:
    """A model and what is said of it in one line."""

    model: str
    words: str


def shortened(table: Table, results: Results) -> Table:
    """Keep the columns that people compare: of the main table also with its verdicts, of others with its settings."""
    if table.name == "main":
        return _main(table, results)
    single = [task for task in results.tasks if len(results.tasks) > 1]
    others = [one.name for one in column_measures() if one is not FORWARD_KL]
    dropped = [column for column in table.columns if column.style == "percent" and column.key in single]
    kept = [at for at, one in enumerate(table.columns) if one not in dropped and one.key not in others]
    compared = results.averages or results.single
    marked = table.name not in ("method", "minutes")
    return replace(_kept(table, kept), notes=(_marks(results) if compared else NO_MARKS,)) if marked else table


def _marks(results: Results) -> str:
    """Explain the marks against each baseline that there is."""
    against = "P↑ P↓: better or worse than the PTQ student; T↑ T↓: than the teacher; P= T=: equivalent"
    if all(row.kind != "ptq" for row in results.rows):
        against = "T↑ T↓: better or worse than the teacher; T=: equivalent"
    return f"{against}; ≈: not distinguishable from the best, which is bold where there is one."


def _main(table: Table, results: Results) -> Table:
    """Keep model, KL, accuracy and size, with the verdicts in the place of marks."""
    accuracy = AVERAGE if len(results.tasks) > 1 else "".join(results.tasks)
    (block,) = table.blocks
    judged = [(*cells, _verdict(results, row)) for row, cells in zip(results.rows, block.rows, strict=True)]
    whole = replace(table, columns=(*table.columns, VERDICT), blocks=(Block("", tuple(judged)),))
    places = {column.key: at for at, column in enumerate(whole.columns)}
    compared = ("model", "forward_kl", accuracy, *results.rolling, "verdict", "size_bytes")
    kept = _kept(whole, [places[key] for key in compared if key in places])
    rows = tuple(tuple(replace(cell, marks=()) for cell in row) for row in kept.rows)
    return replace(without_empty(replace(kept, blocks=(Block("", rows),))), notes=(_legend(results),))


def _kept(table: Table, kept: Sequence[int]) -> Table:
    """Take some columns, in this order."""
    blocks = tuple(Block(one.heading, tuple(tuple(row[at] for at in kept) for row in one.rows)) for one in table.blocks)
    return replace(table, columns=tuple(table.columns[at] for at in kept), blocks=blocks)


def _judged(results: Results, row: Row) -> list[tuple[Kind, Judged | None]]:
    """List the baselines that a row of results has, each with what was found on the average of all tasks."""
    if row.kind == "teacher" or not results.tasks or not all(model.scores for model in row.models):
        return []
    kinds: list[Kind] = [kind for kind in BASELINES if baseline(results.study, results.all_rows, row, kind) is not None]
    return [(kind, results.judged(row, kind, results.tasks)) for kind in kinds]


def _verdict(results: Results, row: Row) -> Cell:
    found = [f"{NAMES[kind]}: {one.verdict if one else NO_ITEMS}" for kind, one in _judged(results, row)]
    return Cell("; ".join(found) or None)


def _legend(results: Results) -> str:
    what = "averages" if len(results.tasks) > 1 else "accuracies"
    return (
        "Accuracy in percent ± one standard error; KL in nats a held-out token with a 95 % interval; bold: better than "
        f"every other student. Verdicts are on {what}, after Holm's correction; equivalent: within "
        f"±{100 * results.contrasts.margin:g} points."
        + (" Of bits per byte fewer are better." if results.rolling else "")
    )


def headlines(results: Results) -> list[Headline]:
    """Say of every student in one line what its accuracy and its KL show."""
    students = [row for row in results.rows if row.kind != "teacher"]
    said = ([*_accuracy(results, row), *_rolling(results, row), *_distance(results, row)] for row in students)
    return [Headline(row.name, "; ".join(words)) for row, words in zip(students, said, strict=True)]


def _accuracy(results: Results, row: Row) -> list[str]:
    if not all(model.tasks for model in row.models):
        return ["not evaluated on any task yet (--task names some)"]
    if not results.tasks or not all(model.scores for model in row.models):
        return []
    return [_told(PHRASES[kind], one) for kind, one in _judged(results, row)] or ["no baseline was evaluated"]


def _told(name: str, judged: Judged | None) -> str:
    """Say a verdict with the difference, or with what the comparison could have seen."""
    if judged is None:
        return f"nothing to conclude against {name} without per-item results"
    difference = f"{100 * abs(judged.found.difference.value):.2f} points"
    return {
        "better": f"better than {name} by {difference}",
        "worse": f"worse than {name} by {difference}",
        "equivalent": f"equivalent to {name}",
        "cannot tell": f"cannot tell from {name} (would see {100 * judged.found.mde:.1f} points)",
    }[judged.verdict]


def _rolling(results: Results, row: Row) -> list[str]:
    """Compare bits per byte of whole documents with the PTQ student's, or the teacher's where there is none."""
    bases = {kind: baseline(results.study, results.all_rows, row, kind) for kind in BASELINES}
    kind: Kind = "ptq" if bases["ptq"] else "teacher"
    said = []
    for task in results.rolling if bases[kind] else ():
        if (difference := per_byte(row, task, bases[kind])) is not None:
            more = f"{fixed(abs(difference.value), 4)} {'less' if difference.value < 0 else 'more'} than"
            which = more if differs(difference) else "not distinguishable from"
            said.append(f"bits per byte of {task.removesuffix('_offline')} {which} {PHRASES[kind]}'s")
    return said


def _distance(results: Results, row: Row) -> list[str]:
    """Compare the KL to the teacher with the PTQ student's."""
    base = baseline(results.study, results.all_rows, row, "ptq")
    difference = per_token_difference(base, row, FORWARD_KL) if base else None
    share = removed(base, row) if base else None
    if difference is None or share is None:
        return []
    if not differs(difference):
        return ["KL not distinguishable from PTQ's"]
    if difference.value > 0:
        return [f"KL {fixed(difference.value, 4)} more than PTQ's"]
    return [f"{100 * share.value:.0f} % of PTQ's KL removed"]
