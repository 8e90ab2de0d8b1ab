"""Figures of numbers over numbers: learning-rate sweeps, training, cost."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from kdctl.report.charts import Band, Mark, Panel, Planes, Point, Series, mark
from kdctl.report.columns import Results
from kdctl.report.contrasts import Row, baseline
from kdctl.report.marks import accuracy_mark, by_method, kl_mark, method_of, short, telling, values, varied
from kdctl.report.spent import from_the_start, quantized
from kdctl.report.study import Model
from kdctl.report.study_reader import LOSSES, distill_section
from kdctl.run.record_files import read_record
from kdctl.run.records import StoreManifest

KL = "KL to teacher, nats/token"
MINUTE = 60.0
RATE = "learning rate"
COLUMNS = 3
NAMED = 8
"""Up to so many rows each have a marker of their own."""
WIDE = 20
"""Ratio of the ends of an axis from which it is logarithmic."""
Measured = Callable[[Row], Mark | None]
Cost = Callable[[Model], float | None]


def learning_rates(results: Results) -> Planes | None:
    """Show accuracy, KL and training loss over the learning rate, a column for each λ; None without a sweep."""
    groups = [group for group in varied(results.rows, ("lr",)) if group[0].settings.lmbda is not None]
    if not groups:
        return None
    average = "average " if len(results.tasks) > 1 else ""
    measures: list[tuple[str, Measured]] = [
        (f"{average}accuracy, %", lambda row: accuracy_mark(row, results.tasks)),
        (KL, kl_mark),
        ("training loss, nats/token", _loss),
    ]
    lambdas = values([group[0] for group in groups], "lmbda")
    columns = [[group for group in groups if group[0].settings.lmbda == lmbda] for lmbda in lambdas]
    rows = [[_swept(results, column, label, of) for column in columns] for label, of in measures]
    full = [row for row in rows if any(series.points for panel in row for series in panel.series)]
    trimmed = [
        tuple(
            replace(panel, title="" if row is not full[0] else panel.title, x_label="" if row is not full[-1] else RATE)
            for panel in row
        )
        for row in full
    ]
    caption = (
        "Each point is a setting, its seeds averaged; all other settings are equal along a line. 95 % intervals over "
        "items or documents, and over seeds; the training loss, the mean of the last tenth of the steps, has none. "
        "Hatched: the PTQ student."
    )
    return Planes("learning-rate", "Learning rate", caption, tuple(trimmed))


def _loss(row: Row) -> Mark | None:
    found = [model.train_loss for model in row.models if model.train_loss is not None]
    return Mark(float(np.mean(found))) if found else None


def _swept(results: Results, groups: Sequence[Sequence[Row]], label: str, measured: Measured) -> Panel:
    """Draw one measure over the learning rate, a line for each group of equal settings."""
    first = groups[0][0]
    names = telling([group[0] for group in groups], ("lr",)) if len(groups) > 1 else ["distilled"]
    series = tuple(
        Series(name, tuple(_points(sorted(group, key=lambda row: row.settings.lr or 0.0), measured)))
        for name, group in zip(names, groups, strict=True)
    )
    ptq = baseline(results.study, results.all_rows, first, "ptq")
    level = measured(ptq) if ptq else None
    bands = (Band("PTQ student", level),) if level else ()
    title = f"λ = {first.settings.lmbda:g} ({method_of(first)})"
    ticks = tuple(values([row for group in groups for row in group], "lr"))
    return Panel(title, RATE, label, series, bands, log_x=True, ticks=ticks)


def _points(rows: Sequence[Row], measured: Measured) -> Iterator[Point]:
    for row in rows:
        found = measured(row)
        if found is not None and row.settings.lr is not None:
            yield Point(row.settings.lr, found)


def training(results: Results) -> Planes | None:
    """Show the training loss and the held-out KL over the steps, a panel for each setting; None without curves."""
    ordered = [row for _, rows in by_method(results.rows) for row in rows]
    panels = [_trained(row) for row in ordered if any(model.curve for model in row.models)]
    if not panels:
        return None
    rows = tuple(tuple(panels[start : start + COLUMNS]) for start in range(0, len(panels), COLUMNS))
    caption = (
        "Training loss of each step, which is the divergence that β names, and KL(teacher‖student) on held-out "
        "documents. The KL during training is of the first of them only and has no interval; before it and of the "
        "student that was kept it is of all, with 95 % intervals over documents. A line for each seed."
    )
    return Planes("training", "Training and held-out KL", caption, rows)


def _trained(row: Row) -> Panel:
    series = [part for model in row.models for part in _curves(model)]
    title = f"{method_of(row)}: {short(row.name)}"
    return Panel(title, "step", "nats/token", tuple(part for part in series if part.points))


def _curves(model: Model) -> Iterator[Series]:
    loss = [Point(line["step"], Mark(line[name])) for line in model.curve for name in LOSSES if name in line]
    name = "eval/forward_kl"
    held_out = [Point(line["step"], Mark(line[name])) for line in model.curve if name in line]
    yield Series("training loss", tuple(loss), faint=True)
    yield Series("held-out KL, first documents", tuple(held_out))
    if model.distilled:
        kept = model.distilled.kept_step
        ends = ((0, model.distilled.before), (model.distilled.steps if kept is None else kept, model.distilled.after))
        points = tuple(Point(step, mark(found.forward_kl)) for step, found in ends)
        yield Series("held-out KL, all documents", points, joined=False)


def minutes(results: Results) -> Planes | None:
    """Show the held-out KL of PTQ methods and variants over the time that each took; None below two points."""
    series = [Series(one.name, (Point(one.seconds / MINUTE, one.kl),), joined=False) for one in quantized(results)]
    spent = _spent(_distilled(results), lambda model: _minutes(from_the_start(results, model)))
    series += [part for part in spent if part.points]
    if sum(len(part.points) for part in series) < 2:
        return None
    caption = (
        "KL on held-out completions with 95 % intervals over documents, over the minutes that quantizing took and, for "
        "distilled students, training after it, on the machines that did them. Neither holds the time in which "
        "rollout stores were filled before."
    )
    panel = Panel("", "minutes", KL, tuple(series), log_x=_is_wide(series))
    return Planes("minutes", "KL and minutes", caption, ((panel,),))


def _minutes(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / MINUTE


def costs(results: Results) -> Planes | None:
    """Show the held-out KL over tokens generated for training; None without a variant that was trained."""
    rows = _distilled(results)
    ptq = baseline(results.study, results.all_rows, rows[0], "ptq") if rows else None
    level = kl_mark(ptq) if ptq else None
    bands = (Band("PTQ student", level),) if level else ()
    series = tuple(part for part in _spent(rows, generated_tokens) if part.points)
    if not series:
        return None
    caption = (
        "KL on held-out completions, each seed alone, with 95 % intervals over documents. Tokens are all of the "
        "rollout stores that a variant read or wrote, also where it used a part; variants share the stores that were "
        "filled before training. Hatched: the PTQ student, which costs none."
    )
    panel = Panel("", "tokens generated for training", KL, series, bands, _is_wide(series))
    return Planes("cost", "Tokens and KL", caption, ((panel,),))


def layers(results: Results) -> Planes | None:
    """Show what each decoder layer of a model costs alone; None where none was measured."""
    measured = [(row, row.models[0].result) for row in results.rows]
    series = tuple(
        Series(short(row.name), tuple(Point(number, mark(one)) for number, one in enumerate(found.layers)))
        for row, found in measured
        if found is not None and found.layers
    )
    if not series:
        return None
    caption = (
        "KL on some of the held-out completions when one decoder layer of a model stands in the place of the first "
        "model's, with 95 % intervals over documents. Layers count from 0, at the tokens."
    )
    panel = Panel("", "decoder layer", KL, series)
    return Planes("layers", "Where the loss sits", caption, ((panel,),))


def _distilled(results: Results) -> list[Row]:
    return [row for row in results.rows if row.kind == "variant" and row.models[0].distilled]


def _spent(rows: Sequence[Row], cost: Cost) -> Iterator[Series]:
    """Group points by row while markers last, else by method."""
    groups = [(short(row.name), [row]) for row in rows] if len(rows) <= NAMED else by_method(rows)
    for name, members in groups:
        models = [model for row in members for model in row.models]
        pairs = [(cost(model), kl_mark(Row(model.name, (model,)))) for model in models]
        yield Series(name, tuple(Point(x, y) for x, y in pairs if x is not None and y is not None), joined=False)


def _is_wide(series: Sequence[Series]) -> bool:
    found = [point.x for part in series for point in part.points]
    return min(found) > 0 and max(found) > WIDE * min(found)


def generated_tokens(model: Model) -> float | None:
    """Count the tokens that models wrote for a variant, none for a data set's; None where a store is gone."""
    if model.distilled is None or model.run is None:
        return None
    variant = model.run.variant(model.key)
    section = distill_section(variant.report, model.distilled)
    folders = [
        variant.rollouts if source == "student" and section.live else model.run.rollouts(source, model.distilled.mix)
        for source in model.distilled.stores
    ]
    if section.replay:
        folders.append(model.run.variant(section.replay).rollouts)
    paths = [folder / "manifest.json" for folder in folders]
    if not all(path.exists() for path in paths):
        return None
    manifests = [read_record(path, StoreManifest) for path in paths]
    return float(sum(found.completion_tokens for found in manifests if found.sampling is not None))
