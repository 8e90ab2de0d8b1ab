"""Results of a run folder to tables: one row a model, a column a task, with error bars."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdctl.errors import PresetError, StoreError
from kdctl.records import DistillReport, DistributionMetrics, Estimate, EvalResult, QuantizeReport
from kdctl.rundir import RunDir, read_record, write_text

FORMS = ("markdown", "csv", "json")
ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """One model of the table. Accuracies are shares in [0, 1]; ``tasks`` maps a name to (value, standard error)."""

    model: str
    settings: dict[str, object] = field(default_factory=dict)
    tasks: dict[str, tuple[float, float]] = field(default_factory=dict)
    forward_kl: Estimate | None = None
    perplexity: float | None = None
    text_perplexity: float | None = None
    size_bytes: int | None = None

    @property
    def is_student(self) -> bool:
        """Tell whether the row competes for bold."""
        return self.model != "teacher"


def average(row: Row, tasks: Sequence[str]) -> tuple[float, float] | None:
    """Unweighted mean over a table's tasks and its standard error, tasks taken as independent.

    None for a row that lacks a task: a mean over other tasks is not comparable.
    """
    if not tasks or not set(tasks) <= row.tasks.keys():
        return None
    values, errors = zip(*(row.tasks[name] for name in tasks), strict=True)
    return sum(values) / len(tasks), math.hypot(*errors) / len(tasks)


def read_rows(run: RunDir) -> list[Row]:
    """Read one row for each model that the folder has results of. Raises StoreError if there are none."""
    variants = [variant.name for variant in run.variants()]
    names = ["teacher", "ptq", *(name for name in _foreign_names(run) if name not in variants), *variants]
    rows = [row for row in (_read_row(run, name) for name in names) if row is not None]
    if not rows:
        raise StoreError(f"{run.path} has no results yet; run kdctl quantize, distill or eval with this --run first")
    return rows


def _foreign_names(run: RunDir) -> list[str]:
    """List the evaluated models that were made elsewhere, by name."""
    found = [read_record(path, EvalResult) for path in sorted(run.eval_root.glob("*/results.json"))]
    return [result.model for result in found if result.reference is not None]


def write_report(run: RunDir, form: str = "markdown") -> str:
    """Render the table of everything in a run folder, write it under ``report/`` and return it in the asked form."""
    if form not in FORMS:
        raise PresetError(f"--table {form!r} is not a table form; use {', '.join(FORMS)}")
    rows = read_rows(run)
    _write_changed(run.report / "report.md", markdown(rows))
    _write_changed(run.report / "tables" / "main.csv", as_csv(rows))
    return {"markdown": markdown, "csv": as_csv, "json": as_json}[form](rows)


def _write_changed(path: Path, text: str) -> None:
    """Write a file unless it says the same already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _read_row(run: RunDir, name: str) -> Row | None:
    """Read a model's evaluation; before there is one, what quantize or distill measured."""
    results = run.eval(name) / "results.json"
    if results.exists():
        return _from_eval(read_record(results, EvalResult))
    folder = run.student if name == "ptq" else run.variant(name).final
    quantized = folder / "quantize.json"
    if name == "teacher" or not quantized.exists():
        return None
    report = read_record(quantized, QuantizeReport)
    variant = run.variant(name).report
    settings = read_record(variant, DistillReport).settings if variant.exists() else {}
    return _row(name, settings, {}, report.distribution, report.text.perplexity.value, report.student_bytes)


def _from_eval(result: EvalResult) -> Row:
    tasks = {name: (score.value, score.stderr) for name, score in result.tasks.items()}
    text = result.text.perplexity.value
    return _row(result.model, result.settings, tasks, result.distribution, text, result.size_bytes)


def _row(
    name: str,
    settings: dict[str, object],
    tasks: dict[str, tuple[float, float]],
    distribution: DistributionMetrics,
    text_perplexity: float,
    size_bytes: int,
) -> Row:
    kl = None if name == "teacher" else distribution.forward_kl
    return Row(name, settings, tasks, kl, distribution.perplexity.value, text_perplexity, size_bytes)


def task_names(rows: Sequence[Row]) -> list[str]:
    """List the tasks of all rows in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.tasks))


def markdown(rows: Sequence[Row]) -> str:
    """Lay the table out for people: accuracies in percent ± one standard error, best student in bold."""
    tasks = task_names(rows)
    header = ["model", "λ", "β", "lr", *(name.removesuffix("_offline") for name in tasks)]
    header += ["average"] if tasks else []
    header += ["KL to teacher [95 %]", "perplexity", "text perplexity", "MiB"]
    body = [_cells(row, tasks) for row in rows]
    _embolden(rows, body, tasks)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *body]) + "\n"


def _cells(row: Row, tasks: Sequence[str]) -> list[str]:
    cells = [row.model, *(_setting(row, key) for key in ("lmbda", "beta", "lr"))]
    cells += [_percent(row.tasks.get(name)) for name in tasks]
    cells += [_percent(average(row, tasks))] if tasks else []
    kl = row.forward_kl
    cells.append(f"{kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}]" if kl else ABSENT)
    cells += [f"{value:.2f}" if value is not None else ABSENT for value in (row.perplexity, row.text_perplexity)]
    cells.append(f"{row.size_bytes / 2**20:.1f}" if row.size_bytes is not None else ABSENT)
    return cells


def _setting(row: Row, key: str) -> str:
    value = row.settings.get(key)
    return f"{value:g}" if isinstance(value, int | float) else ABSENT


def _percent(score: tuple[float, float] | None) -> str:
    return f"{100 * score[0]:.1f} ± {100 * score[1]:.1f}" if score else ABSENT


def _scores(row: Row, tasks: Sequence[str]) -> list[float | None]:
    """Return what each comparable column is ranked by, larger is better."""
    values: list[float | None] = [row.tasks[name][0] if name in row.tasks else None for name in tasks]
    mean = average(row, tasks)
    values += [mean[0] if mean else None] if tasks else []
    smaller = [row.forward_kl.value if row.forward_kl else None, row.perplexity, row.text_perplexity]
    return values + [-value if value is not None else None for value in smaller]


def _embolden(rows: Sequence[Row], body: list[list[str]], tasks: Sequence[str]) -> None:
    """Put the best student of each column in bold; equal bests all are."""
    scored = [(index, _scores(row, tasks)) for index, row in enumerate(rows) if row.is_student]
    for column in range(len(scored[0][1]) if scored else 0):
        values = {index: score for index, scores in scored if (score := scores[column]) is not None}
        if len(values) < 2:
            continue
        for index, value in values.items():
            if value == max(values.values()):
                body[index][4 + column] = f"**{body[index][4 + column]}**"


def as_csv(rows: Sequence[Row]) -> str:
    """Lay the table out for spreadsheets: one number a cell, full precision."""
    flat = [_flat(row, task_names(rows)) for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def as_json(rows: Sequence[Row]) -> str:
    """Lay the table out for programs: a list of objects."""
    return json.dumps([_flat(row, task_names(rows)) for row in rows], indent=2, ensure_ascii=False) + "\n"


def _flat(row: Row, tasks: Sequence[str]) -> dict[str, object]:
    flat: dict[str, object] = {
        "model": row.model,
        **{key: row.settings.get(key) for key in ("lmbda", "beta", "lr", "seed")},
    }
    for name in tasks:
        flat[name], flat[f"{name}_stderr"] = row.tasks.get(name, (None, None))
    flat["average"], flat["average_stderr"] = average(row, tasks) or (None, None)
    kl = row.forward_kl
    flat |= {
        "forward_kl": kl.value if kl else None,
        "forward_kl_low": kl.low if kl else None,
        "forward_kl_high": kl.high if kl else None,
        "perplexity": row.perplexity,
        "text_perplexity": row.text_perplexity,
        "size_bytes": row.size_bytes,
    }
    return flat
