"""From run folders to a report on disk and the tables that are asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from kdctl.base.errors import PresetError
from kdctl.config.preset import TrackingSection
from kdctl.report.document import Report, as_json, as_markdown, make_report, verdict_parts
from kdctl.report.figures import figures
from kdctl.report.gallery import illustrate
from kdctl.report.layouts import LAYOUTS, lay_out
from kdctl.report.page import page
from kdctl.report.study_reader import read_study
from kdctl.report.tables import RENDERERS, Form, Table, as_csv, records
from kdctl.run.paths import RunDir, write_text
from kdctl.run.tracking import log_tables

MARGIN = 0.005


def check_options(form: str, layout: str, margin: float) -> Form:
    """Return the form. Raises PresetError for an unknown one, an unknown layout, and a margin that is none."""
    if layout not in (*LAYOUTS, "auto"):
        raise PresetError(f"--layout {layout!r} is not a layout; use {', '.join(LAYOUTS)} or auto")
    if not 0 < margin < 1:
        raise PresetError(
            f"--margin {100 * margin:g} is not a margin of equivalence: it is in points of accuracy, above 0 and below "
            "100, because nothing is equivalent within 0; half a point is --margin 0.5"
        )
    for known in get_args(Form):
        if known == form:
            return known
    raise PresetError(f"--table {form!r} is not a table form; use {', '.join(get_args(Form))}")


def write_report(
    runs: Sequence[RunDir],
    form: str = "markdown",
    layout: str = "main",
    margin: float = MARGIN,
    out: Path | None = None,
    tracking: TrackingSection | None = None,
) -> str:
    """Write the report of one or several run folders and return a layout's tables in the asked form.

    ``margin`` is a fraction of 1. The report goes to ``out``, else to a run's own ``report/``, else to ``report/``
    beside the first of several. The run's preset says whether wandb gets the tables too, unless ``tracking`` does.
    Raises PresetError for an option that does not exist and for a layout that the folders cannot fill, and what
    ``read_study`` raises.
    """
    known = check_options(form, layout, margin)
    study = read_study(runs)
    report = make_report(study, margin)
    made = report.layouts if layout == "auto" else [table for table in report.layouts if table.name == layout]
    tables = made or lay_out(layout, study, report.results.contrasts)
    folder = out or (runs[0].report if len(runs) == 1 else runs[0].path.parent / "report")
    preset = study.sources[0].preset
    settings = tracking or (preset.tracking if preset else TrackingSection())
    if _write(report, folder):
        log_tables(settings, folder.parent, {table.name: records(table) for table in report.tables})
    return _printed(report, tables, known)


def _printed(report: Report, tables: Sequence[Table], form: Form) -> str:
    """Render tables; in Markdown, which people read, the verdicts go first."""
    text = RENDERERS[form](tables)
    return "\n\n".join([*verdict_parts(report.verdicts), text]) if form == "markdown" else text


def _write(report: Report, folder: Path) -> bool:
    """Write every file of a report, and tell whether any but a figure is new."""
    charts = figures(report.results)
    drawn = illustrate(charts, folder / "figures")
    texts = {folder / "tables" / f"{table.name}.csv": as_csv([table]) for table in report.tables}
    texts |= {folder / "report.md": as_markdown(report, charts), folder / "report.html": page(report, drawn)}
    texts |= {folder / "report.json": as_json(report)}
    return any([_write_changed(path, text) for path, text in texts.items()])  # noqa: C419 - all are to be written


def _write_changed(path: Path, text: str) -> bool:
    """Write a file unless it says the same already, and tell whether it was."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True
