"""The figures that a study's models can fill: forest plots and the grid of settings; curves are beside it."""

from collections import Counter
from collections.abc import Callable, Sequence

from kdctl.report.bits import bits_per_byte
from kdctl.report.charts import Cell, Chart, Entry, Forest, ForestPanel, Map, Maps, Mark, mark
from kdctl.report.columns import Results
from kdctl.report.contrasts import Row, baseline, differs, per_token_difference
from kdctl.report.curves import costs, layers, learning_rates, minutes, training
from kdctl.report.details import recovery_of, removed
from kdctl.report.effects import KL_MARGIN, setting_changes
from kdctl.report.marks import PERCENT, accuracy_mark, by_method, short, telling, values, varied
from kdctl.report.study import HELDOUT, PTQ_WRITTEN, STUDENT_WRITTEN, Model, Text
from kdctl.run.measures import FORWARD_KL, P_RIGHT
from kdctl.run.records import Estimate
from kdctl.stats.findings import Recovery

OVER_ITEMS = "95 % intervals over items, and over seeds where a setting has several"
OVER_DOCUMENTS = "95 % intervals over documents"
REACH = (-50.0, 150.0)
NOT_MEASURED = "not measured"
WRITERS: dict[Text, str] = {
    HELDOUT: "the teacher's text",
    PTQ_WRITTEN: "the PTQ student's",
    STUDENT_WRITTEN: "its own text",
}


def figures(results: Results) -> list[Chart]:
    """Return every figure that the study can fill."""
    made = (
        minutes(results),
        verdicts(results),
        changes(results),
        layers(results),
        accuracies(results),
        learning_rates(results),
        grid(results),
        training(results),
        writers(results),
        recoveries(results),
        costs(results),
    )
    return [chart for chart in made if chart is not None]


def _entries(rows: Sequence[Row], marks: Callable[[Row], Sequence[Mark | None]], note: str = "") -> tuple[Entry, ...]:
    """List rows under the names of their methods; teacher and PTQ student need no heading."""
    entries = []
    for method, members in by_method(rows):
        if members[0].kind not in ("teacher", "ptq"):
            entries.append(Entry(method))
        entries += [Entry(short(row.name), tuple(marks(row)), note) for row in members]
    return tuple(entries)


def _single(rows: Sequence[Row]) -> list[Row]:
    """Take the seeds of every row apart."""
    return [Row(model.name, (model,)) for row in rows for model in row.models]


def accuracies(results: Results) -> Forest | None:
    """Show the accuracy of every model, methods together: on average and on each task."""
    rows = [row for row in results.rows if all(model.scores for model in row.models)]
    average = [("average of tasks", results.tasks)] if len(results.tasks) > 1 else []
    parts = [*average, *((task.removesuffix("_offline"), (task,)) for task in results.tasks)]
    if not rows or not parts:
        return None
    students = [row for row in rows if row.kind == "ptq"]
    panels = []
    for label, tasks in parts:
        first = accuracy_mark(students[0], tasks) if len(students) == 1 else None
        entries = _entries(rows, lambda row, tasks=tasks: (accuracy_mark(row, tasks),))
        panels.append(ForestPanel(f"{label}, %", entries, first.value if first else None))
    dashed = " Dashed: the PTQ student." if len(students) == 1 else ""
    caption = f"Accuracy in percent, {OVER_ITEMS}. Intervals of two models may overlap although their paired "
    caption += f"difference is clear: the verdicts say what may be concluded.{dashed}"
    return Forest("accuracy", "Accuracy by method", caption, ("",), tuple(panels))


def verdicts(results: Results) -> Forest | None:
    """Show what training changed: of every variant against its PTQ student, KL, P(right) and accuracy."""
    rows = [row for row in results.rows if row.kind in ("variant", "foreign")]
    bases = {row.name: baseline(results.study, results.all_rows, row, "ptq") for row in rows}

    def gone(row: Row) -> tuple[Mark | None]:
        base = bases[row.name]
        return (_percent(removed(base, row)) if base else None,)

    def saved(row: Row) -> tuple[Mark | None]:
        base = bases[row.name]
        found = bits_per_byte(row, results.choices, base) if base else None
        return (mark(found, -1.0) if found else None,)

    def gained(row: Row, tasks: Sequence[str], measure: str, factor: float) -> tuple[Mark | None]:
        judged = results.judged(row, "ptq", tasks, measure)
        return (mark(judged.found.difference, factor) if judged else None,)

    margin = results.contrasts.margin
    panels = [ForestPanel("KL removed, %", _entries(rows, gone, NOT_MEASURED), 0.0, margin=PERCENT * KL_MARGIN)]
    if any(bits_per_byte(row, results.choices) for row in rows):
        entries = _entries(rows, saved, NOT_MEASURED)
        panels.append(ForestPanel("bits saved per byte", entries, 0.0))
    if P_RIGHT.name in results.derived:
        entries = _entries(rows, lambda row: gained(row, results.choices, P_RIGHT.name, 1.0), NOT_MEASURED)
        panels.append(ForestPanel("gain in P(right)", entries, 0.0, margin=margin))
    if results.tasks:
        entries = _entries(rows, lambda row: gained(row, results.tasks, "", PERCENT), NOT_MEASURED)
        what = "average score" if len(results.tasks) > 1 else "score"
        panels.append(ForestPanel(f"gain in {what}, points", entries, 0.0, margin=PERCENT * margin))
    kept = tuple(panel for panel in panels if any(one for entry in panel.entries for one in entry.marks))
    if not kept:
        return None
    caption = (
        "Every variant against the PTQ student that it was trained from, paired, with 95 % intervals; right of the "
        "line is better. Shaded: differences too small to matter. An interval within the shade shows that nothing "
        "changed, one beside the line that something did, and one that does neither leaves it open. Bits: of right "
        "answers."
    )
    return Forest("verdicts", "What training changed", caption, ("",), kept)


def changes(results: Results) -> Forest | None:
    """Show what each setting changes in KL, by who wrote the text."""
    found = setting_changes(results)
    if not found:
        return None
    texts: dict[Text, str] = {text: label for text, label in WRITERS.items() if any(text in one.on for one in found)}
    entries = []
    for change in dict.fromkeys(one.change for one in found):
        entries.append(Entry(change))
        for one in (one for one in found if one.change == change):
            marks = tuple(_percent(one.on.get(text)) for text in texts)
            entries.append(Entry(one.where or "all else equal", marks))
    panel = ForestPanel("change in KL, % of the PTQ student's", tuple(entries), 0.0, margin=PERCENT * KL_MARGIN)
    caption = (
        "Variants that differ in one setting, the second against the first, paired, with 95 % intervals over "
        "documents, or over prompts where each student wrote its own; left is better. Shaded: less than "
        f"{PERCENT * KL_MARGIN:g} % of the KL that quantization left, too small to matter."
    )
    return Forest("changes", "What each setting changes", caption, tuple(texts.values()), (panel,))


def writers(results: Results) -> Forest | None:
    """Show the KL to the teacher on teacher-written, student-written and plain text; None without the others."""
    rows = [row for row in _single(results.rows) if row.kind != "teacher" and row.models[0].result]
    columns = [_written(row.models[0]) for row in rows]
    kept = [index for index in range(4) if any(column[index] for column in columns)]
    if kept in ([], [0]):
        return None
    names = ("teacher-written completions", "the PTQ student's", "the student's own", "plain text")

    def marks(row: Row) -> list[Mark | None]:
        found = _written(row.models[0])
        return [mark(one) if (one := found[index]) else None for index in kept]

    panel = ForestPanel("KL(teacher‖student), nats a token", _entries(rows, marks))
    caption = (
        "KL to the teacher per token, each seed alone, on held-out completions that the teacher, the PTQ student or "
        f"the student itself wrote, and on plain text, as far as measured; {OVER_DOCUMENTS}."
    )
    return Forest("writers", "KL by who wrote the text", caption, tuple(names[index] for index in kept), (panel,))


def _written(model: Model) -> list[Estimate | None]:
    found = model.result
    if found is None:
        return [None] * 4
    parts = (found.distribution, found.ptq_written, found.student_written, found.text_distribution)
    return [part.forward_kl if part else None for part in parts]


def recoveries(results: Results) -> Forest | None:
    """Show the share of lost accuracy that every variant, each seed alone, won back; None without any."""
    rows = [row for row in _single(results.rows) if row.kind in ("variant", "foreign")]
    shares = {row.name: recovery_of(results, row, results.tasks) for row in rows}
    known = [found for found in shares.values() if found]
    if not any(found.estimate for found in known):
        return None
    entries = _entries(rows, lambda row: (_share(shares[row.name]),), "no share, see below")
    what = "average accuracy" if len(results.tasks) > 1 else "accuracy"
    panel = ForestPanel(f"{what} recovered, %", entries, 0.0, REACH)
    reasons = sorted({found.reason for found in known if found.reason})
    told = f" No share is given where {'; '.join(reasons)}." if reasons else ""
    caption = (
        "The share of the accuracy that quantization cost which came back, each seed alone: (student − PTQ) / (teacher "
        f"− PTQ), with Fieller's 95 % interval over items.{told}"
    )
    return Forest("recovery", "What came back", caption, ("",), (panel,))


def _share(found: Recovery | None) -> Mark | None:
    return _percent(found.estimate) if found else None


def _percent(found: Estimate | None) -> Mark | None:
    return mark(found, PERCENT) if found else None


def grid(results: Results) -> Maps | None:
    """Show differences to the PTQ student over β and λ, where variants differ in both and in nothing else."""
    groups = [part for group in varied(results.rows, ("lmbda", "beta"), ("max_new_tokens",)) for part in _grids(group)]
    names = telling([_last(group) for group in groups], ("lmbda", "beta"))
    maps = []
    for group, name in zip(groups, names, strict=True):
        suffix = f"\n{name}" if name else ""
        maps += [_accuracy_map(results, group, suffix), _kl_map(results, group, suffix)]
    kept = tuple(one for one in maps if one.cells)
    if not kept:
        return None
    caption = (
        "Paired differences to the PTQ student with 95 % intervals. Outlined: distinguishable from it, ↑ better or "
        "↓ worse, of accuracies after Holm's correction over all comparisons of averages. The lighter, the better. "
        "Hatched: no such model."
    )
    return Maps("grid", "β and λ together, against the PTQ student", caption, kept)


def _grids(rows: Sequence[Row]) -> list[list[Row]]:
    """Split rows by rollout length, which λ = 0 does not have, and keep what varies along both sides of a grid."""
    lengths = values(rows, "max_new_tokens") or [None]
    parts = [[row for row in rows if row.settings.max_new_tokens in (None, length)] for length in lengths]
    return [part for part in parts if _repeats(part, "lmbda") and _repeats(part, "beta")]


def _last(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row.settings.lmbda or 0.0)


def _repeats(rows: Sequence[Row], name: str) -> bool:
    return any(count > 1 for count in Counter(vars(row.settings)[name] for row in rows).values())


def _accuracy_map(results: Results, rows: Sequence[Row], suffix: str) -> Map:
    found = {}
    for row in rows:
        judged = results.judged(row, "ptq", results.tasks)
        if judged:
            found[row.name] = Cell(mark(judged.found.difference, PERCENT), judged.verdict in ("better", "worse"))
    what = "Average accuracy" if len(results.tasks) > 1 else "Accuracy"
    return _map(f"{what}, points{suffix}", rows, found, 2, more_is_better=True)


def _kl_map(results: Results, rows: Sequence[Row], suffix: str) -> Map:
    found = {}
    for row in rows:
        base = baseline(results.study, results.all_rows, row, "ptq")
        difference = per_token_difference(base, row, FORWARD_KL) if base else None
        if difference:
            found[row.name] = Cell(mark(difference), differs(difference))
    return _map(f"KL to the teacher, nats a token{suffix}", rows, found, 3, more_is_better=False)


def _map(title: str, rows: Sequence[Row], found: dict[str, Cell], digits: int, more_is_better: bool) -> Map:
    lambdas, betas = values(rows, "lmbda"), values(rows, "beta")
    return Map(
        title=title,
        x_label="λ, share of student-written sequences",
        y_label="β: 0 forward KL, 1 reverse KL",
        columns=tuple(f"{value:g}" for value in lambdas),
        rows=tuple(f"{value:g}" for value in betas),
        cells={
            (betas.index(row.settings.beta or 0.0), lambdas.index(row.settings.lmbda or 0.0)): found[row.name]
            for row in rows
            if row.name in found
        },
        digits=digits,
        more_is_better=more_is_better,
    )
