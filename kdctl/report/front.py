"""From run folders to a report on disk, and the part of it that is asked for."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from kdctl.base.errors import PresetError
from kdctl.config.preset import TrackingSection
from kdctl.report.charts import Chart
from kdctl.report.document import Report, as_json, as_markdown, make_report, verdict_parts
from kdctl.report.figure_files import write_figures
from kdctl.report.figures import figures as figures_of
from kdctl.report.layouts import LAYOUTS, lay_out
from kdctl.report.page import page
from kdctl.report.short import Headline, headlines, shortened
from kdctl.report.study_reader import read_study
from kdctl.report.tables import RENDERERS, Table, TableFormat, as_csv, records
from kdctl.run.files import read_bytes, write_text
from kdctl.run.locks import Say, holding, lock_of
from kdctl.run.paths import RunDir
from kdctl.run.tracking import log_tables

MARGIN = 0.005


@dataclass(frozen=True)
class Excerpt:
    """What is shown of a report: its verdicts and the tables of one layout."""

    paragraphs: tuple[str, ...]
    """The verdicts in full, one paragraph of Markdown each."""
    tables: tuple[Table, ...] = ()
    headlines: tuple[Headline, ...] = ()
    """The verdicts in a line each."""
    short_tables: tuple[Table, ...] = ()
    """The columns that people compare."""
    folder: Path | None = None
    """Where the whole report is."""

    def text(self, form: TableFormat = "markdown") -> str:
        """Render the tables; in Markdown, which people read, the verdicts go first."""
        if form != "markdown":
            return RENDERERS[form](self.tables)
        return "\n\n".join([*self.paragraphs, *([RENDERERS[form](self.tables)] if self.tables else [])])


def table_format(name: str) -> TableFormat:
    """Return a format of tables by its name. Raises PresetError for an unknown one."""
    for known in get_args(TableFormat):
        if known == name:
            return known
    raise PresetError(f"--table {name!r} is not a table form; use {', '.join(get_args(TableFormat))}")


def check_options(layout: str, margin: float) -> None:
    """Raise PresetError for an unknown layout, and for a margin that is none."""
    if layout not in (*LAYOUTS, "auto"):
        raise PresetError(f"--layout {layout!r} is not a layout; use {', '.join(LAYOUTS)} or auto")
    if not 0 < margin < 1:
        raise PresetError(
            f"--margin {100 * margin:g} is not a margin of equivalence: it is in points of accuracy, above 0 and below "
            "100, because nothing is equivalent within 0; half a point is --margin 0.5"
        )


def check_place(folder: Path) -> None:
    """Raise PresetError unless a folder can be written, or made, at a place."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise PresetError(
            f"--out {folder}: {there} is no folder, and a report is a folder of files; name another place"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise PresetError(f"--out {folder}: {there} cannot be written to; name another place")


def write_report(
    runs: Sequence[RunDir],
    layout: str = "main",
    margin: float = MARGIN,
    out: Path | None = None,
    tracking: TrackingSection | None = None,
    figures: bool = True,
    say: Say = lambda _: None,
) -> Excerpt:
    """Write the report of one or several run folders and return its verdicts and a layout's tables.

    ``margin`` is a fraction of 1. The report goes to ``out``, else to a run's own ``report/``, else to ``report/``
    beside the first of several. The run's preset says whether wandb gets the tables too, unless ``tracking`` does.
    Without ``figures`` nothing is drawn and nothing refers to a figure. A report is read and written by one process at
    a time; ``say`` is told of one that is waited for. Raises PresetError for an option that does not exist and for a
    layout that the folders cannot fill, and what ``read_study`` raises.
    """
    check_options(layout, margin)
    if out is not None:
        check_place(out)
    folder = out or (runs[0].report if len(runs) == 1 else runs[0].path.parent / "report")
    own = folder == runs[0].report and runs[0].path.is_dir()
    with holding(runs[0].lock("report") if own else lock_of(folder), f"the report {folder}", say):
        return _made(runs, layout, margin, folder, tracking, figures)


def _made(
    runs: Sequence[RunDir], layout: str, margin: float, folder: Path, tracking: TrackingSection | None, figures: bool
) -> Excerpt:
    """Read run folders and write their report to a folder."""
    study = read_study(runs)
    report = make_report(study, margin)
    asked = ("minutes", "main") if layout == "main" else (layout,)
    made = report.layouts if layout == "auto" else [table for table in report.layouts if table.name in asked]
    tables = made or lay_out(layout, study, report.results.contrasts)
    preset = study.sources[0].preset
    settings = tracking or (preset.tracking if preset else TrackingSection())
    if _write(report, folder, figures_of(report.results) if figures else []):
        log_tables(settings, folder.parent, {table.name: records(table) for table in report.tables})
    return Excerpt(
        paragraphs=tuple(verdict_parts(report.verdicts)),
        tables=tuple(tables),
        headlines=tuple(headlines(report.results)),
        short_tables=tuple(shortened(table, report.results) for table in tables),
        folder=folder,
    )


def _write(report: Report, folder: Path, charts: Sequence[Chart]) -> bool:
    """Write every file of a report, and tell whether any but a figure is new."""
    drawn = write_figures(charts, folder / "figures")
    texts = {folder / "tables" / f"{table.name}.csv": as_csv([table]) for table in report.tables}
    texts |= {folder / "report.md": as_markdown(report, charts), folder / "report.html": page(report, drawn)}
    texts |= {folder / "report.json": as_json(report)}
    return any([_write_changed(path, text) for path, text in texts.items()])  # noqa: C419 - all are to be written


def _write_changed(path: Path, text: str) -> bool:
    """Write a file unless it says the same already, and tell whether it was."""
    if path.is_file() and read_bytes(path) == text.encode():
        return False
    write_text(path, text)
    return True
