"""``kdctl report``: the report on disk, and what of it is shown on a terminal or printed for programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdctl.base.errors import PresetError
from kdctl.cli import console, fit
from kdctl.cli.options import RunOption, VerboseOption, guarded, process_rank, run_folder

if TYPE_CHECKING:
    from kdctl.report.front import Excerpt
    from kdctl.report.tables import Block, Table


def report(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Run folders; several are joined. (default: --run)", file_okay=False)
    ] = None,
    run: RunOption = None,
    table: Annotated[
        str | None,
        typer.Option(
            help="markdown, csv, json, latex or html. (default: a table that fits, on a terminal; else markdown)"
        ),
    ] = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="On a terminal, show all columns; elsewhere they are all there anyway.")
    ] = False,
    layout: Annotated[
        str,
        typer.Option(
            help="main, lambda, beta, lr, steps, batch-size, rollout-length, mix, mixed, rank, method, minutes; auto: "
            "those that can be filled."
        ),
    ] = "main",
    margin: Annotated[float, typer.Option(help="Differences up to this many points are equivalent.")] = 0.5,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Draw figures into the report, or leave them out.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder to write. (default: report/ in the run folder, or beside the first of several)"
        ),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Say what differs, with statistics; print a table of it and write all of them to report/.

    Example: kdctl report --table markdown --layout auto
    """
    with guarded():
        if folders and run is not None:
            raise PresetError("run folders and --run name the same thing; leave --run out")
        if wide and table is not None:
            raise PresetError(
                f"--wide is for the table on a terminal, and --table {table} has all columns anyway; leave one of them "
                "out"
            )
        from kdctl.report.front import table_format, write_report
        from kdctl.run.paths import RunDir

        form = table_format(table) if table is not None else None
        runs = [RunDir(folder) for folder in folders or [run_folder(None, run)]]
        found = write_report(runs, layout, margin / 100, out, figures=figures, say=console.ConsoleReporter().note)
        if form is None:
            show_report(found, wide)
        else:
            console.show_text(found.text(form))


def show_report(found: "Excerpt", wide: bool = False) -> None:
    """Show an excerpt to a person on a terminal; print it as Markdown anywhere else."""
    if not console.on_terminal():
        console.show_text(found.text())
        if found.folder is not None and process_rank() == 0:
            console.ConsoleReporter().note(f"verdicts in full and all tables: {found.folder / 'report.html'}")
    elif found.folder is None:
        for paragraph in found.paragraphs:
            console.show_paragraph(paragraph)
    else:
        _show(found, found.tables if wide else found.short_tables, found.folder)


def _show(found: "Excerpt", tables: "Sequence[Table]", folder: Path) -> None:
    """Show tables, then verdicts in a line each, how to read them, and where everything else is."""
    for table in tables:
        for index, block in enumerate(table.blocks):
            _show_block(table, block, table.title if index == 0 else "")
    for headline in found.headlines:
        console.show_paragraph(headline.words, headline.model)
    console.show_text("")
    for note in dict.fromkeys(note for table in tables for note in table.notes):
        console.show_paragraph(note, style="dim")
    console.show_paragraph(f"Verdicts in full and all tables: {folder / 'report.html'}", style="dim")


def _show_block(table: "Table", block: "Block", title: str) -> None:
    """Show the rows of a block, in several tables where one cannot hold all columns."""
    room = console.terminal_width()
    titles = [text for text in (title, block.heading) if text]
    for band in fit.bands(_columns(table, block), room):
        console.show_columns("\n".join(titles), *fit.fit(band, room))
        console.show_text("")
        titles = []


def _columns(table: "Table", block: "Block") -> list[fit.Column]:
    """Turn a block into columns; marks follow their value."""
    from kdctl.report.tables import show_parts

    columns = []
    for index, column in enumerate(table.columns):
        cells = [row[index] for row in block.rows]
        parts = tuple((*show_parts(cell, column.style), " ".join(cell.marks)) for cell in cells)
        filled = tuple(tuple(part for part in one if part) for one in parts)
        columns.append(fit.Column(column.label, filled, tuple(cell.bold for cell in cells), column.style == "text"))
    return columns
