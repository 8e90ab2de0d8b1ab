"""Tables of numbers with errors, intervals and marks, in five forms."""

import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kdctl.base.strict_json import write_json
from kdctl.run.measures import fixed
from kdctl.run.records import Estimate

TableFormat = Literal["markdown", "csv", "json", "latex", "html"]
Style = Literal["text", "number", "percent", "points", "kl", "perplexity", "mib", "p", "share", "ratio", "blur"]
ABSENT = "–"
Value = float | int | str | None
FORMATS: dict[Style, Callable[[float], str]] = {
    "number": lambda value: f"{value:g}",
    "percent": lambda value: f"{100 * value:.1f}",
    "points": lambda value: f"{100 * value:+.2f}",
    "ratio": lambda value: f"{value:.1f}",
    "blur": lambda value: fixed(value, 2),
    "share": lambda value: f"{100 * value:.0f} %",
    "kl": lambda value: fixed(value, 4),
    "perplexity": lambda value: fixed(value, 2),
    "mib": lambda value: f"{value / 2**20:.1f}",
    "p": lambda value: "<0.001" if value < 0.001 else f"{value:.3f}",
}
SYMBOLS = {
    "\\": r"\textbackslash{}",
    "λ": r"$\lambda$",
    "β": r"$\beta$",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "≈": r"$\approx$",
    "−": "$-$",
    "–": "--",
    "‖": r"$\Vert$",
    "<": "$<$",
    ">": "$>$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
} | {character: "\\" + character for character in "&%$#_{}"}


@dataclass(frozen=True)
class Cell:
    """A value, in the unit of its column, and what is known of its uncertainty."""

    value: Value = None
    error: float | None = None
    """One standard error."""
    low: float | None = None
    high: float | None = None
    """95 % interval."""
    marks: tuple[str, ...] = ()
    bold: bool = False


def estimated(found: Estimate | None) -> Cell:
    """Write an estimate with its interval; one document has none."""
    if found is None or not found.bounded:
        return Cell(found.value if found else None)
    return Cell(found.value, low=found.low, high=found.high)


@dataclass(frozen=True)
class Column:
    """A column: its name for programs, its label for people, and how its values are shown."""

    key: str
    label: str
    style: Style = "text"


@dataclass(frozen=True)
class Block:
    """Rows that belong together, such as those of one λ."""

    heading: str
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Table:
    """A table in one or several blocks of the same columns, and the legend under it."""

    name: str
    title: str
    columns: tuple[Column, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        """All rows of all blocks."""
        return [row for block in self.blocks for row in block.rows]


def without_empty(table: Table) -> Table:
    """Drop the columns in which no row has a value."""
    kept = [index for index in range(len(table.columns)) if any(row[index].value is not None for row in table.rows)]
    blocks = [
        replace(block, rows=tuple(tuple(row[index] for index in kept) for row in block.rows)) for block in table.blocks
    ]
    return replace(table, columns=tuple(table.columns[index] for index in kept), blocks=tuple(blocks))


def show(cell: Cell, style: Style) -> str:
    """Write a cell's value with its error or interval, without marks."""
    return " ".join(show_parts(cell, style))


def show_parts(cell: Cell, style: Style) -> tuple[str, ...]:
    """Write a cell in parts that may stand on lines of their own: the value with its error, then its interval.

    Of words, the clauses between semicolons.
    """
    if cell.value is None:
        return (ABSENT,)
    if isinstance(cell.value, str) or style == "text":
        return tuple(re.split(r"(?<=;) ", str(cell.value)))
    written = FORMATS[style]
    text = written(cell.value) + (f" ± {written(cell.error)}" if cell.error is not None else "")
    if cell.low is None or cell.high is None:
        return (text,)
    return text, f"[{written(cell.low)}, {written(cell.high)}]"


def markdown(tables: Sequence[Table]) -> str:
    """Lay tables out for people and code hosts."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: Table) -> str:
    parts = [f"### {table.title}", *(_markdown_block(table, block) for block in table.blocks), *table.notes]
    return "\n\n".join(parts) + "\n"


def _markdown_block(table: Table, block: Block) -> str:
    lines = [[column.label for column in table.columns], ["---"] + ["---:"] * (len(table.columns) - 1)]
    lines += [_texts(table, row, lambda text: f"**{text}**") for row in block.rows]
    escaped = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
    return "\n".join(([f"**{block.heading}**", ""] if block.heading else []) + escaped)


def _texts(table: Table, row: Sequence[Cell], bold: Callable[[str], str]) -> list[str]:
    """Write a row; marks follow their value after a space."""
    texts = []
    for column, cell in zip(table.columns, row, strict=True):
        text = show(cell, column.style)
        texts.append(" ".join([bold(text) if cell.bold else text, *cell.marks]))
    return texts


def latex(tables: Sequence[Table]) -> str:
    """Lay tables out for a paper; only standard LaTeX is needed."""
    return "\n".join(_latex(table) for table in tables)


def _latex(table: Table) -> str:
    header = " & ".join(map(escape_latex, (column.label for column in table.columns)))
    lines = [r"\begin{table}", rf"\caption{{{escape_latex(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", r"\hline", header + r" \\"]
    for block in table.blocks:
        lines.append(r"\hline")
        if block.heading:
            lines.append(rf"\multicolumn{{{len(table.columns)}}}{{l}}{{{escape_latex(block.heading)}}} \\")
        lines += [" & ".join(_latex_cells(table, row)) + r" \\" for row in block.rows]
    lines += [r"\hline", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {escape_latex(note)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _latex_cells(table: Table, row: Sequence[Cell]) -> list[str]:
    cells = []
    for column, cell in zip(table.columns, row, strict=True):
        text = escape_latex(show(cell, column.style))
        marks = "".join(rf"\textsuperscript{{{escape_latex(mark)}}}" for mark in cell.marks)
        cells.append((rf"\textbf{{{text}}}" if cell.bold else text) + marks)
    return cells


def escape_latex(text: str) -> str:
    """Escape what LaTeX would take for commands, and write Greek letters and arrows as mathematics."""
    return "".join(SYMBOLS.get(character, character) for character in text)


def as_html(tables: Sequence[Table]) -> str:
    """Lay tables out as plain HTML without styles."""
    return "\n".join(_html(table) for table in tables)


def _html(table: Table) -> str:
    lines = [f'<table id="{html.escape(table.name)}">', f"<caption>{html.escape(table.title)}</caption>", "<thead>"]
    lines += ["<tr>" + "".join(f"<th>{html.escape(column.label)}</th>" for column in table.columns) + "</tr>"]
    lines += ["</thead>"]
    for block in table.blocks:
        lines.append("<tbody>")
        if block.heading:
            lines.append(f'<tr><th colspan="{len(table.columns)}">{html.escape(block.heading)}</th></tr>')
        lines += ["<tr>" + "".join(_html_cells(table, row)) + "</tr>" for row in block.rows]
        lines.append("</tbody>")
    return "\n".join([*lines, "</table>", *(f"<p>{html.escape(note)}</p>" for note in table.notes)]) + "\n"


def _html_cells(table: Table, row: Sequence[Cell]) -> list[str]:
    cells = []
    for column, cell in zip(table.columns, row, strict=True):
        text = html.escape(show(cell, column.style))
        marks = "".join(f"<sup>{html.escape(mark)}</sup>" for mark in cell.marks)
        cells.append(f"<td>{f'<strong>{text}</strong>' if cell.bold else text}{marks}</td>")
    return cells


def records(table: Table) -> list[dict[str, Value]]:
    """Flatten a table for programs: one value a key in full precision, every row with the same keys."""
    blocks = any(block.heading for block in table.blocks)
    return [
        ({"block": block.heading} if blocks else {}) | _record(table, row)
        for block in table.blocks
        for row in block.rows
    ]


def _record(table: Table, row: Sequence[Cell]) -> dict[str, Value]:
    flat: dict[str, Value] = {}
    for index, (column, cell) in enumerate(zip(table.columns, row, strict=True)):
        flat[column.key] = cell.value
        cells = [other[index] for other in table.rows]
        if any(other.error is not None for other in cells):
            flat[f"{column.key}_stderr"] = cell.error
        if any(other.low is not None for other in cells):
            flat |= {f"{column.key}_low": cell.low, f"{column.key}_high": cell.high}
        if any(other.marks for other in cells):
            flat[f"{column.key}_marks"] = " ".join(cell.marks)
    return flat


def as_csv(tables: Sequence[Table]) -> str:
    """Lay tables out for spreadsheets, an empty line between two."""
    return "\n".join(map(_csv, tables))


def _csv(table: Table) -> str:
    flat, buffer = records(table), io.StringIO()
    writer = csv.DictWriter(
        buffer, list(flat[0]) if flat else [column.key for column in table.columns], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def as_json(tables: Sequence[Table]) -> str:
    """Lay tables out for programs: a list of tables, each with its rows as objects."""
    return write_json([document(table) for table in tables]) + "\n"


def document(table: Table) -> dict[str, object]:
    """Return what JSON says of a table."""
    return {"name": table.name, "title": table.title, "rows": records(table), "notes": list(table.notes)}


RENDERERS: dict[TableFormat, Callable[[Sequence[Table]], str]] = {
    "markdown": markdown,
    "csv": as_csv,
    "json": as_json,
    "latex": latex,
    "html": as_html,
}
