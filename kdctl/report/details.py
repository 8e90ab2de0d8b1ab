"""The tables behind the verdicts: every comparison, distances, recovery, seeds."""

from collections.abc import Iterator, Sequence

import numpy as np

from kdctl import stats
from kdctl.report.bits import bits, rolling
from kdctl.report.by_source import sources
from kdctl.report.columns import AVERAGE, BASELINES, STYLES, Results, distance_cell, served_notes
from kdctl.report.contrasts import Found, Judged, Row, baseline, per_token_difference
from kdctl.report.study import Kind
from kdctl.report.tables import Block, Cell, Column, Table, estimated, without_empty
from kdctl.run.measures import FORWARD_KL, P_RIGHT, TOKEN_MEASURES, TokenMeasure, column_measures
from kdctl.run.records import Estimate
from kdctl.stats import Trio
from kdctl.stats.findings import Comparison, Recovery

NAMES: dict[Kind, str] = {"ptq": "PTQ", "teacher": "teacher"}


def _parts(results: Results) -> list[tuple[str, tuple[str, ...]]]:
    """Name the average, where there is one, and every task."""
    average = [(AVERAGE, results.tasks)] if len(results.tasks) > 1 else []
    return [*average, *((task, (task,)) for task in results.tasks)]


def comparisons(results: Results) -> Table:
    """List every comparison with its baseline, and the single seeds of rows that have several."""
    rows = []
    for row in results.rows:
        for kind in BASELINES if row.kind != "teacher" else ():
            for name, tasks in _parts(results):
                judged = results.judged(row, kind, tasks)
                if judged:
                    rows.append(_comparison(row.name, kind, name, judged.found, judged))
                    rows += _seeds(results, row, kind, name, tasks)
    columns = (
        Column("model", "model"),
        Column("baseline", "against"),
        Column("task", "on"),
        Column("difference", "difference, points [95 %]", "points"),
        Column("p", "p", "p"),
        Column("p_holm", "Holm's p", "p"),
        Column("p_mcnemar", "McNemar's exact p", "p"),
        Column("harmful", "harmful flips", "number"),
        Column("beneficial", "beneficial flips", "number"),
        Column("flip_rate", "flip rate, %", "percent"),
        Column("mde", "detectable, points", "percent"),
        Column("verdict", "verdict"),
    )
    single = f" and, apart from them, {len(results.single)} of single tasks" if results.single else ""
    notes = (
        f"Paired by item. Detectable: the true difference that is seen with 80 % power at two-sided 5 %. Equivalent: "
        f"two one-sided tests at 5 % within ±{100 * results.contrasts.margin:g} points. Holm's p is corrected for "
        f"{len(results.averages)} comparisons of averages{single}; "
        "equivalence is not corrected. Harmful: right before and wrong now.",
    )
    return Table("comparisons", "Comparisons, item by item", columns, (Block("", tuple(rows)),), notes)


def _comparison(name: str, kind: Kind, task: str, found: Found, judged: Judged | None) -> tuple[Cell, ...]:
    difference, flips = estimated(found.difference), [Cell()] * 4
    if isinstance(found, Comparison):
        flips = [Cell(value) for value in (found.p_mcnemar, found.harmful, found.beneficial, found.flip_rate)]
    words = judged.words if judged else "one of the seeds above"
    p_holm = judged.p_holm if judged else None
    names = [Cell(text) for text in (name, NAMES[kind], task)]
    return (*names, difference, Cell(found.p), Cell(p_holm), *flips, Cell(found.mde), Cell(words))


def _seeds(results: Results, row: Row, kind: Kind, name: str, tasks: Sequence[str]) -> Iterator[tuple[Cell, ...]]:
    """Compare each seed alone, for its flips; no verdict is taken from it."""
    base = baseline(results.study, results.all_rows, row, kind)
    for model in row.models if len(row.models) > 1 and base else ():
        found = results.contrasts.over(base, Row(model.name, (model,)), tasks) if base else None
        if found:
            yield _comparison(model.name, kind, name, found, None)


def distances(results: Results) -> Table:
    """List how far each student is from the teacher per held-out token, against its PTQ student."""
    rows, measures = [], [FORWARD_KL, *(one for one in column_measures() if one.ranked and one is not FORWARD_KL)]
    for row in results.rows:
        base = baseline(results.study, results.all_rows, row, "ptq")
        if row.kind == "teacher" or base is None:
            continue
        found = [per_token_difference(base, row, measure) for measure in measures]
        if any(found):
            first, *others = map(estimated, found)
            rows.append((Cell(row.name), first, estimated(removed(base, row)), *others))
    first, *others = map(_difference_column, measures)
    columns = (Column("model", "model"), first, Column("removed", "share of KL removed [95 %]", "share"), *others)
    note = "Nats a token, paired over held-out documents (percentile bootstrap); not corrected for being several."
    return without_empty(Table("distances", "Distance to the teacher", columns, (Block("", tuple(rows)),), (note,)))


def held_out(results: Results) -> Table:
    """List everything that is measured of each student on held-out tokens, as it is."""
    measures = [one for one in TOKEN_MEASURES.values() if one.of != "teacher"]
    rows = [
        (Cell(row.name), *(distance_cell(row, measure) for measure in measures))
        for row in results.rows
        if row.kind != "teacher"
    ]
    columns = (Column("model", "model"), *(Column(one.name, one.label, STYLES[one.unit]) for one in measures))
    note = "On completions that the teacher wrote, with 95 % intervals over documents."
    notes = (note, *served_notes(results.rows))
    return without_empty(Table("held_out", "Held-out tokens", columns, (Block("", tuple(rows)),), notes))


def _difference_column(measure: TokenMeasure) -> Column:
    """Describe the column of differences of a measure per token."""
    label = f"{measure.exponent or measure.heading}, less the PTQ student's [95 %]"
    return Column(f"{measure.column}_difference", label, "kl")


def removed(base: Row, row: Row) -> Estimate | None:
    """Estimate 1 − KL(row)/KL(base), over documents and seeds; None where documents are missing or no KL was there."""
    before, after = base.documents, row.documents
    if not before or not after:
        return None
    old = np.mean([one[FORWARD_KL] for one in before], axis=0)
    if not old.sum() > 0:
        return None
    new = np.mean([one[FORWARD_KL] for one in after], axis=0)
    shares = [1 - one[FORWARD_KL].sum() / old.sum() for one in after]
    return stats.widen(stats.removed(new, old), shares)


def recovery_of(results: Results, row: Row, tasks: Sequence[str]) -> Recovery | None:
    """Estimate (student − PTQ) / (teacher − PTQ) of one model on one task or the average of several."""
    ptq = baseline(results.study, results.all_rows, row, "ptq")
    teacher = baseline(results.study, results.all_rows, row, "teacher")
    if ptq is None or teacher is None or not tasks:
        return None
    trios = {}
    for task in tasks:
        found = [one.answers(task) for one in (row, ptq, teacher)]
        if any(answers is None or answers.dtype != np.bool_ for answers in found):
            return None  # of answers that are right or wrong only
        student, before, best = (np.asarray(answers)[0] for answers in found)
        trios[task] = Trio(student, before, best, row.clusters(task))
    return stats.recovery_average(trios)


def recoveries(results: Results) -> Table:
    """List how much of what quantization lost each variant won back; single seeds apart."""
    rows = []
    for row in results.rows:
        for model in row.models if row.kind in ("variant", "foreign") else ():
            for name, tasks in _parts(results):
                found = recovery_of(results, Row(model.name, (model,)), tasks)
                if found:
                    cells = (estimated(found.estimate), estimated(found.bootstrap))
                    rows.append((Cell(model.name), Cell(name), *cells, Cell(found.reason)))
    columns = (
        Column("model", "model"),
        Column("task", "on"),
        Column("recovery", "recovered [95 %, Fieller]", "share"),
        Column("bootstrap", "[95 %, bootstrap]", "share"),
        Column("reason", "why there is no share"),
    )
    note = "(student − PTQ) / (teacher − PTQ), in accuracy; over items, one seed at a time."
    return Table("recovery", "Recovered accuracy", columns, (Block("", tuple(rows)),), (note,))


def spreads(results: Results) -> Table:
    """List where the variation of settings with several seeds comes from."""
    rows = []
    for row in results.rows:
        for task in results.tasks if len(row.models) > 1 else ():
            answers = row.answers(task)
            if answers is None:
                continue
            found = stats.seeds(answers, row.clusters(task))
            parts = (found.seed_variance, found.item_variance, found.residual_variance)
            deviations = [Cell(None if part is None else float(np.sqrt(part))) for part in parts]
            names = (Cell(row.name), Cell(task), Cell(found.seeds))
            rows.append((*names, Cell(found.accuracy.value, found.standard_error), *deviations))
    columns = (
        Column("model", "setting"),
        Column("task", "on"),
        Column("seeds", "seeds", "number"),
        Column("accuracy", "accuracy, %", "percent"),
        Column("seed_sd", "σ between seeds, points", "percent"),
        Column("item_sd", "σ between items, points", "percent"),
        Column("residual_sd", "σ of the rest, points", "percent"),
    )
    note = "Two-way random effects; a part whose estimate is negative is 0."
    return Table("seeds", "Several seeds of one setting", columns, (Block("", tuple(rows)),), (note,))


def measures(results: Results) -> Table:
    """List every comparison by measures of items beside the headline, on the average of the multiple-choice tasks."""
    rows = []
    for name in results.derived:
        for row in results.rows:
            for kind in BASELINES:
                judged = results.judged(row, kind, results.choices, name)
                if judged:
                    found, texts = judged.found, (row.name, NAMES[kind], name)
                    numbers = (estimated(found.difference), Cell(found.p), Cell(judged.p_holm), Cell(found.mde))
                    sharp = [Cell(_blur(results, row, kind, measure)) for measure in (name, "")]
                    rows.append((*map(Cell, texts), *numbers, *sharp, Cell(judged.words)))
    columns = (
        Column("model", "model"),
        Column("baseline", "against"),
        Column("measure", "measure"),
        Column("difference", "difference [95 %]", "kl"),
        Column("p", "p", "p"),
        Column("p_holm", "Holm's p", "p"),
        Column("mde", "detectable", "kl"),
        Column("blur", "half interval over what quantization cost", "blur"),
        Column("accuracy_blur", "the same of accuracy", "blur"),
        Column("verdict", "verdict"),
    )
    note = (
        "Paired by item, on the average of the multiple-choice tasks; Holm's p is corrected within each measure. "
        f"p_right is the {P_RIGHT.label}: another quantity than accuracy, and not to be read as points of it."
    )
    return Table("measures", "Other measures, item by item", columns, (Block("", tuple(rows)),), (note,))


def _blur(results: Results, row: Row, kind: Kind, measure: str) -> float | None:
    """Return half of a difference's interval in units of what quantization alone cost, by the same measure."""
    base = baseline(results.study, results.all_rows, row, kind)
    ptq = row if row.kind == "ptq" else baseline(results.study, results.all_rows, row, "ptq")
    teacher = baseline(results.study, results.all_rows, row, "teacher")
    if base is None or ptq is None or teacher is None:
        return None
    found = results.contrasts.over(base, row, results.choices, measure)
    cost = results.contrasts.over(teacher, ptq, results.choices, measure)
    if found is None or cost is None or not cost.difference.value:
        return None
    return (found.difference.high - found.difference.low) / 2 / abs(cost.difference.value)


def answers(results: Results) -> Table:
    """List what the answers of each model are like, on the tasks that generate."""
    rows = []
    for row in results.rows:
        for model in row.models:
            scored = model.result.tasks if model.result else {}
            for task, score in scored.items():
                if (found := score.answers) is not None:
                    texts = (Cell(model.name), Cell(task.removesuffix("_offline")), Cell(score.metric))
                    numbers = (score.value, found.samples, found.tokens, found.ended, found.repetition)
                    rows.append((*texts, *map(Cell, numbers)))
    columns = (
        Column("model", "model"),
        Column("task", "on"),
        Column("metric", "score"),
        Column("value", "score, %", "percent"),
        Column("samples", "answers an item", "number"),
        Column("tokens", "tokens an answer", "ratio"),
        Column("ended", "ended by itself, %", "percent"),
        Column("repetition", "repeated runs of four tokens, %", "percent"),
    )
    note = "On-policy training moves how long answers are, whether they end, and how much they repeat."
    return Table("answers", "Written answers", columns, (Block("", tuple(rows)),), (note,))


def detail_tables(results: Results) -> list[Table]:
    """Return the tables behind the verdicts that have any row."""
    made = [comparisons(results), measures(results), bits(results), rolling(results), answers(results)]
    alone = not any(row.kind == "ptq" for row in results.rows)  # distances have nothing to be measured against
    made += [held_out(results)] if alone else [distances(results)]
    made += [recoveries(results), spreads(results), sources(results)]
    return [table for table in made if table.rows]
