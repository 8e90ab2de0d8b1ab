"""Bits per byte of right answers and of whole documents: how well a model would compress them."""

from collections.abc import Callable, Iterator, Sequence

from kdctl import stats
from kdctl.report.columns import AVERAGE, Results
from kdctl.report.contrasts import Row, baseline, bits_over_bytes, per_byte
from kdctl.report.tables import Block, Cell, Column, Table, estimated, without_empty
from kdctl.run.measures import WORD_PERPLEXITY
from kdctl.run.records import Estimate

Measured = Callable[[Row, Row | None], Estimate | None]
"""Bits per byte of a row, less those of another where one is given."""
COLUMNS = (
    Column("model", "model"),
    Column("task", "on"),
    Column("bits", "bits per byte [95 %]", "kl"),
    Column("ptq_difference", "less the PTQ student's [95 %]", "kl"),
    Column("teacher_difference", "less the teacher's [95 %]", "kl"),
    Column("blur", "half interval over what quantization cost", "blur"),
)
BLUR = (
    "Half interval: of the difference to the PTQ student, over that between PTQ student and teacher. Not corrected for "
    "being several."
)


def bits(results: Results) -> Table:
    """List bits per byte of the right choices, and their paired differences to the PTQ student and the teacher."""
    parts = [(AVERAGE, results.choices)] if len(results.choices) > 1 else []
    parts += [(task.removesuffix("_offline"), (task,)) for task in results.choices]
    rows = [
        cells
        for name, tasks in parts
        for _, cells in _rows(results, name, lambda row, base, tasks=tasks: bits_per_byte(row, tasks, base))
    ]
    note = (
        "−log₂ likelihood of the right choice over its bytes, lower is better, paired by item; of evaluations that "
        f"kept no bytes over its characters, which are as many in plain English. {BLUR}"
    )
    return without_empty(Table("bits", "Bits per byte of right answers", COLUMNS, (Block("", tuple(rows)),), (note,)))


def rolling(results: Results) -> Table:
    """List bits per byte of whole documents, with the same differences."""
    rows = [
        (*cells, Cell(_word_perplexity(row, task)))
        for task in results.rolling
        for row, cells in _rows(
            results, task.removesuffix("_offline"), lambda row, base, task=task: per_byte(row, task, base)
        )
    ]
    columns = (*COLUMNS, Column("word_perplexity", WORD_PERPLEXITY.label, "perplexity"))
    note = f"−log₂ likelihood of all documents over all their bytes, lower is better, paired by document. {BLUR}"
    title = "Bits per byte of whole documents"
    return without_empty(Table("rolling", title, columns, (Block("", tuple(rows)),), (note,)))


def _word_perplexity(row: Row, task: str) -> float | None:
    """Return what lm-eval reports of one model."""
    result = row.models[0].result
    return result.tasks[task].metrics.get(WORD_PERPLEXITY.name) if result and len(row.models) == 1 else None


def _rows(results: Results, name: str, measured: Measured) -> Iterator[tuple[Row, tuple[Cell, ...]]]:
    for row in results.rows:
        own = measured(row, None)
        if own is None:
            continue
        ptq, teacher = (baseline(results.study, results.all_rows, row, kind) for kind in ("ptq", "teacher"))
        others = [measured(row, base) if base and row.kind != "teacher" else None for base in (ptq, teacher)]
        cost = measured(ptq, teacher) if ptq and teacher else None
        gain = others[0]
        blur = (gain.high - gain.low) / 2 / abs(cost.value) if gain and cost and cost.value else None
        yield row, (Cell(row.name), Cell(name), estimated(own), *map(estimated, others), Cell(blur))


def bits_per_byte(row: Row, tasks: Sequence[str], base: Row | None = None) -> Estimate | None:
    """Estimate a row's bits per byte over tasks, less those of another; None where any likelihood was not kept."""
    found = {task: bits_over_bytes(row, task, base) for task in tasks}
    known = {task: ratio for task, ratio in found.items() if ratio is not None}
    return stats.average_ratio(known) if known and len(known) == len(found) else None
