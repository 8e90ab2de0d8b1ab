"""Tables cut to the width of a terminal: cells on one line, else on several, else columns in several tables."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kdctl.cli.console import ShownColumn, cell_len, chop_cells

GAP = 2
NARROW_GAP = 1
NARROW = 16
NARROWEST = 10
LONG = 32


@dataclass(frozen=True)
class Column:
    """A column of cells in parts, which may stand on lines of their own. words: they may also be broken."""

    label: str
    cells: tuple[tuple[str, ...], ...]
    bold: tuple[bool, ...]
    words: bool = False


def fit(columns: Sequence[Column], room: int) -> tuple[list[ShownColumn], int]:
    """Choose widths and line breaks so that columns fit into ``room`` characters; returns them and the gap between.

    Numbers are never broken: what is too wide even with every part on its own line stands out.
    """
    flat = [_shown(column, " ") for column in columns]
    if _total([_least(column) for column in flat], GAP) <= room:
        return _folded(flat, room, GAP), GAP
    stacked = [_shown(column, "\n") for column in columns]
    gap = GAP if _total(_narrowed(stacked, NARROW), GAP) <= room else NARROW_GAP
    return _folded(stacked, room, gap), gap


def bands(columns: Sequence[Column], room: int) -> list[Sequence[Column]]:
    """Divide columns into tables that fit, each with the first column, which names the rows."""
    stacked = [_shown(column, "\n") for column in columns]
    if _total(_narrowed(stacked, NARROWEST), NARROW_GAP) <= room:
        return [columns]
    first, *rest = columns
    found = [[first]]
    for column in rest:
        widths = [_least(_shown(one, " ")) for one in (*found[-1], column)]
        if _total(widths, GAP) > room and len(found[-1]) > 1:
            found.append([first])
        found[-1].append(column)
    return list(found)


def _shown(column: Column, joint: str) -> ShownColumn:
    lines = tuple(joint.join(parts) for parts in column.cells)
    label = column.label.replace(" [", f"{joint}[")
    heads = label.split() if joint == "\n" else [label]
    width = max(cell_len(line) for line in [*heads, *"\n".join(lines).split("\n")])
    return ShownColumn(label, lines, column.bold, width, column.words)


def _least(column: ShownColumn) -> int:
    """Return the width that a column needs to read well; sentences may be broken."""
    return LONG if column.words and column.width > 2 * LONG else column.width


def _narrowed(columns: Sequence[ShownColumn], least: int) -> list[int]:
    """Return the widths of columns if those of words are narrow."""
    return [min(column.width, least) if column.words else column.width for column in columns]


def _total(widths: Sequence[int], gap: int) -> int:
    return sum(widths) + gap * (len(widths) - 1)


def _folded(columns: Sequence[ShownColumn], room: int, gap: int) -> list[ShownColumn]:
    """Narrow the widest column of words, a character at a time, until all fit."""
    widths = [column.width for column in columns]
    foldable = [index for index, column in enumerate(columns) if column.words]
    while foldable and _total(widths, gap) > room:
        widest = max(foldable, key=lambda index: widths[index])
        if widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    return [
        replace(column, width=width, lines=tuple(fold(text, width) for text in column.lines))
        for column, width in zip(columns, widths, strict=True)
    ]


def fold(text: str, width: int) -> str:
    """Break text into lines of a width: after spaces and underscores if possible, else anywhere."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in re.findall(r"[^\s_]+[\s_]*|[\s_]+", paragraph):
            if lines[-1] and cell_len((lines[-1] + word).rstrip()) > width:
                lines.append("")
            lines[-1] += word
            if cell_len(lines[-1].rstrip()) > width:
                lines[-1:] = chop_cells(lines[-1], width)
    return "\n".join(line.rstrip() for line in lines)
