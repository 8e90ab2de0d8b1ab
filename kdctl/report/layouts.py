"""The tables that a study's models can fill: everything, or one setting varied and the others equal."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from kdctl.base.errors import PresetError
from kdctl.report.columns import (
    SETTINGS,
    Results,
    block,
    measure_cell,
    measure_column,
    served_notes,
    setting_cell,
    setting_column,
    written,
)
from kdctl.report.contrasts import Contrasts, Row, rows_of
from kdctl.report.spent import minutes_table
from kdctl.report.study import PTQ_WRITTEN, STUDENT_WRITTEN, Study, Text
from kdctl.report.tables import Block, Cell, Column, Table, without_empty
from kdctl.run.measures import column_measures

NO_ITEMS = "nothing can be concluded without per-item results"
LOSS = Column("train_loss", "training loss", "kl")
NAME = Column("model", "model")


@dataclass(frozen=True)
class Sweep:
    """One setting varied. ignored: settings that may vary along with it."""

    field: str
    title: str
    ignored: tuple[str, ...] = ()
    loss: bool = False


SWEEPS: dict[str, Sweep] = {
    "lambda": Sweep("lmbda", "λ, the share of student-generated sequences", ("max_new_tokens",)),
    "beta": Sweep("beta", "β: 0 forward KL, 1 reverse KL"),
    "lr": Sweep("lr", "Learning rate"),
    "steps": Sweep("steps", "Training steps", loss=True),
    "batch-size": Sweep("batch_size", "Batch size, sequences a step"),
    "rollout-length": Sweep("max_new_tokens", "Rollout length, tokens"),
    "rank": Sweep("rank", "Rank of low-rank updates"),
    "mix": Sweep("mix", "Weights of the sources of prompts"),
}


def legend(results: Results) -> tuple[str, ...]:
    """Explain a table's numbers and marks."""
    margin = f"±{100 * results.contrasts.margin:g} points"
    scores = "Scores" if len(results.choices) < len(results.tasks) else "Accuracies"
    tasks = f"{scores} in percent ± one standard error (clustered by subject, and by twin sentences); average over "
    kl = "KL per held-out token in nats with a 95 % interval over documents."
    notes = [f"{tasks}tasks, unweighted; {kl}" if results.tasks else kl]
    single = f"over the {len(results.single)} of single tasks, " if results.single else ""
    if results.averages or results.single:
        notes.append(
            f"{_marks(results)} equivalent within {margin}; no mark: cannot tell. Bold: better than every other "
            "student of its block; ≈: not distinguishable from the best. Holm's correction: over the "
            f"{len(results.averages)} comparisons of averages, {single}and "
            "over the rivals of each column's best; not over KL and perplexity, where intervals of the difference "
            "leave out 0, nor over equivalences."
        )
    elif results.tasks:
        notes.append(f"No marks: {NO_ITEMS} of two models; kdctl eval keeps them.")
    if results.rolling:
        notes.append(
            "Bits per byte of whole documents: fewer are better, with a 95 % interval over documents; marked where the "
            "interval of the difference leaves out 0."
        )
    scored = [score for row in results.rows for one in row.models if one.result for score in one.result.tasks.values()]
    if any(score.asked for score in scored):
        notes.append(
            "Some items were not asked (eval.allocation): they count by the teacher's answer, and one that was drawn "
            "from among them for several."
        )
    if any(len(row.models) > 1 for row in results.rows):
        notes.append("Rows of several seeds are their mean; errors and intervals hold the variance between seeds too.")
    if any(len(row.models) == 1 and row.kind == "variant" for row in results.rows):
        notes.append("A row of one seed does not show how much other seeds of its setting differ.")
    return (*notes, *served_notes(results.rows))


def _marks(results: Results) -> str:
    """Explain the marks against each baseline that there is."""
    better = "better or worse than the {} (less KL or perplexity is better);"
    if all(row.kind != "ptq" for row in results.rows):
        return f"T↑ T↓: {better.format('teacher')} T=:"
    return f"P↑ P↓: {better.format('PTQ student')} T↑ T↓: than the teacher; P= T=:"


def main(study: Study, contrasts: Contrasts) -> Table:
    """Lay out every model: teacher, PTQ students, variants."""
    results = Results(study, contrasts)
    names = list(dict.fromkeys(["lmbda", "beta", "lr", *_varying(results.rows)]))
    own = [_name, *(partial(setting_cell, name=name) for name in names)]
    made = block(results, "", results.rows, own)
    last = [(*_on_students(row), _text_perplexity(row), _size(row), *_verdicts(results, row)) for row in results.rows]
    rows = tuple((*cells, *more) for cells, more in zip(made.rows, last, strict=True))
    columns = (
        NAME,
        *map(setting_column, names),
        *(scale.column for scale in results.scales),
        Column("student_written_kl", "KL on its own text [95 %]", "kl"),
        Column("ptq_written_kl", "KL on the PTQ student's text [95 %]", "kl"),
        Column("text_perplexity", "text perplexity", "perplexity"),
        Column("size_bytes", "MiB", "mib"),
        Column("verdict_ptq", "average against PTQ"),
        Column("verdict_teacher", "average against teacher"),
    )
    return without_empty(Table("main", "All models", columns, (Block("", rows),), legend(results)))


def _varying(rows: Sequence[Row]) -> list[str]:
    """List the settings that differ between the rows that have them."""
    values = {name: {vars(row.settings)[name] for row in rows} - {None} for name in SETTINGS}
    return [name for name in SETTINGS if len(values[name]) > 1]


def _name(row: Row) -> Cell:
    return Cell(row.name)


def _on_students(row: Row) -> tuple[Cell, Cell]:
    return _student_kl(row, STUDENT_WRITTEN), _student_kl(row, PTQ_WRITTEN)


def _student_kl(row: Row, text: Text) -> Cell:
    """Write KL to the teacher on completions that the student itself or the PTQ student wrote; the mean of seeds."""
    results = [model.result for model in row.models if model.result]
    written = [one.student_written if text == STUDENT_WRITTEN else one.ptq_written for one in results]
    found = [one.forward_kl for one in written if one is not None]
    if row.kind == "teacher" or len(found) < len(row.models):
        return Cell()
    if len(found) > 1:
        return Cell(float(np.mean([estimate.value for estimate in found])))
    return Cell(found[0].value, low=found[0].low, high=found[0].high)


def _text_perplexity(row: Row) -> Cell:
    found = [model.text.perplexity.value for model in row.models if model.text]
    return Cell(float(np.exp(np.mean(np.log(found))))) if found else Cell()


def _size(row: Row) -> Cell:
    return Cell(row.models[0].size_bytes)


def _verdicts(results: Results, row: Row) -> tuple[Cell, Cell]:
    return _verdict(results, row, "ptq"), _verdict(results, row, "teacher")


def _verdict(results: Results, row: Row, kind: Literal["ptq", "teacher"]) -> Cell:
    """Say what the average shows; that nothing can be concluded, where a baseline is there but no items."""
    if row.kind == "teacher" or row.kind == kind or not all(model.scores for model in row.models):
        return Cell()
    if results.study.baseline(row.models[0], kind) is None:
        return Cell()
    judged = results.judged(row, kind, results.tasks)
    return Cell(judged.words if judged else NO_ITEMS)


def sweep(name: str, study: Study, contrasts: Contrasts) -> Table | None:
    """Lay out the variants that differ in one setting only, a block for each set of the others; None without any."""
    groups = alike(rows_of(study), SWEEPS[name])
    return _swept(name, study, contrasts, groups) if groups else None


def alike(rows: Sequence[Row], which: Sweep) -> list[list[Row]]:
    """Group the variants that differ in one setting only, each group in its order; none of one value alone."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        if row.kind == "variant" and vars(row.settings)[which.field] is not None:
            origin = row.models[0].distilled
            key = (row.settings.key("seed", which.field, *which.ignored), origin.student if origin else None)
            groups.setdefault(key, []).append(row)
    full = [group for group in groups.values() if len({vars(row.settings)[which.field] for row in group}) > 1]
    return [sorted(group, key=lambda row: vars(row.settings)[which.field]) for group in full]


def _swept(name: str, study: Study, contrasts: Contrasts, groups: Sequence[Sequence[Row]]) -> Table:
    which = SWEEPS[name]
    results = Results(study, contrasts, [row for group in groups for row in group])
    extra = [field for field in which.ignored if any(vars(row.settings)[field] for row in results.rows)]
    fields = [which.field, *extra]
    own = [*(partial(setting_cell, name=field) for field in fields), *([_loss] if which.loss else [])]
    texts = headings([group[0] for group in groups], which)
    blocks = tuple(block(results, text, group, own) for text, group in zip(texts, groups, strict=True))
    columns = (*map(setting_column, fields), *([LOSS] if which.loss else []), *(one.column for one in results.scales))
    notes = legend(results) + (("Training loss: mean over the last tenth of the steps.",) if which.loss else ())
    return without_empty(Table(name, which.title, columns, blocks, notes))


def _loss(row: Row) -> Cell:
    found = [model.train_loss for model in row.models if model.train_loss is not None]
    return Cell(float(np.mean(found))) if found else Cell()


def headings(firsts: Sequence[Row], which: Sweep) -> list[str]:
    """Name blocks by λ, unless it is what varies, and by everything else that tells them apart."""
    named = [_named(row) for row in firsts]
    keys = list(dict.fromkeys(key for names in named for key in names))
    shown = [
        key
        for key in keys
        if key not in (which.field, *which.ignored)
        and (key == "lmbda" or len({json.dumps(names.get(key)) for names in named}) > 1)
    ]
    return [
        ", ".join(f"{_label(key)} = {written(names[key])}" for key in shown if names.get(key) is not None)
        for names in named
    ]


def _named(row: Row) -> dict[str, object]:
    """Return all settings of a row by name, the student that training started from among them."""
    named = {key: value for key, value in vars(row.settings).items() if key not in ("rest", "seed")}
    origin = row.models[0].distilled
    return named | (json.loads(row.settings.rest or "{}")) | ({"student": origin.student[:8]} if origin else {})


def _label(key: str) -> str:
    return SETTINGS[key][0] if key in SETTINGS else key


def mixed(study: Study, contrasts: Contrasts) -> Table | None:
    """Lay out the variants that learn from both kinds of data; None without any."""
    rows = [row for row in rows_of(study) if row.settings.lmbda is not None and 0 < row.settings.lmbda < 1]
    if not rows:
        return None
    results = Results(study, contrasts, rows)
    names = list(dict.fromkeys(["lmbda", "beta", *_varying(rows)]))
    made = block(results, "", rows, [_name, *(partial(setting_cell, name=name) for name in names)])
    columns = (NAME, *map(setting_column, names), *(scale.column for scale in results.scales))
    return without_empty(Table("mixed", "Mixed data, 0 < λ < 1", columns, (made,), legend(results)))


def method(study: Study, contrasts: Contrasts) -> Table | None:
    """Lay out post-training methods: PTQ students of joined folders, else what --compare measured; None below two."""
    students = [row for row in rows_of(study) if row.kind == "ptq"]
    names = ["method", "grid"]
    if len({vars(row.settings)["method"] for row in students}) > 1:
        results = Results(study, contrasts, students)
        made = block(results, "", students, [_name, *(partial(setting_cell, name=name) for name in names)])
        columns = (NAME, *map(setting_column, names), *(scale.column for scale in results.scales))
        return without_empty(Table("method", "Post-training methods", columns, (made,), legend(results)))
    compared = [(source.name, found) for source in study.sources for found in source.methods]
    if len(compared) < 2:
        return None
    rows, measures = [], [one for one in column_measures() if one.ranked]
    for folder, found in compared:
        cells = [measure_cell(one, found.distribution.estimate(one)) for one in measures]
        own = map(Cell, (found.text.perplexity.value, found.sqnr_db))
        rows.append((Cell(folder), Cell(found.method), *cells, *own))
    columns = (
        Column("folder", "folder"),
        setting_column("method"),
        *map(measure_column, measures),
        Column("text_perplexity", "text perplexity", "perplexity"),
        Column("sqnr_db", "SQNR dB", "perplexity"),
    )
    note = "As kdctl quantize --compare measured them. No single documents were kept, so no row is marked as best."
    return without_empty(Table("method", "Post-training methods", columns, (Block("", tuple(rows)),), (note,)))


def minutes(study: Study, contrasts: Contrasts) -> Table | None:
    """Lay out what minutes bought; None unless --compare measured a method beside the student's own."""
    return minutes_table(Results(study, contrasts))


NEEDS = {
    "minutes": "methods that kdctl quantize --compare measured beside the student's own",
    "mixed": "a variant with λ between 0 and 1",
    "method": "PTQ students of two methods (join folders, or kdctl quantize --compare)",
}


def lay_out(layout: str, study: Study, contrasts: Contrasts) -> list[Table]:
    """Return the tables of a layout; of ``auto``, all that the study can fill.

    Raises PresetError for an unknown layout and for one that the study cannot fill.
    """
    if layout == "auto":
        return [table for name in LAYOUTS if (table := _table(name, study, contrasts)) is not None]
    if layout not in LAYOUTS:
        raise PresetError(f"--layout {layout!r} is not a layout; use {', '.join(LAYOUTS)} or auto")
    table = _table(layout, study, contrasts)
    if table is None:
        names = ", ".join(name for name in LAYOUTS if _table(name, study, contrasts) is not None)
        label = SETTINGS[SWEEPS[layout].field][0] if layout in SWEEPS else ""
        needs = NEEDS.get(layout, f"two variants of different {label} and otherwise equal settings")
        train = ", which kdctl distill can train" if layout in (*SWEEPS, "mixed") else ""
        raise PresetError(
            f"--layout {layout} needs {needs}, and there is nothing of the kind here{train}; use "
            f"a layout that can be filled: {names}"
        )
    return [table]


def _table(name: str, study: Study, contrasts: Contrasts) -> Table | None:
    if name in SWEEPS:
        return sweep(name, study, contrasts)
    return {"minutes": minutes, "main": main, "mixed": mixed, "method": method}[name](study, contrasts)


LAYOUTS = ("minutes", "main", *(name for name in SWEEPS if name != "rank"), "mixed", "rank", "method")
