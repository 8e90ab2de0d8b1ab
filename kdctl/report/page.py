"""report.html: one file with verdicts, tables that sort, figures, every setting, and how to repeat it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from kdctl.base.version import __version__
from kdctl.report.charts import Chart, Maps
from kdctl.report.document import Report, leading, verdict_parts
from kdctl.report.reproduce import commands
from kdctl.report.short import shortened
from kdctl.report.study import Model, Source
from kdctl.report.tables import Block, Cell, Column, Table, show

MEASURED = {"layers", "tasks", "distribution", "text", "teacher_text", "before", "after", "removed"}
MEASURED |= {"student_written", "ptq_written", "text_distribution", "settings"}
LONG = 40
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(report: Report, figures: Sequence[tuple[Chart, str]]) -> str:
    """Write the page; ``figures`` come with their SVG. It refers to nothing outside itself, and all text is escaped."""
    title = "Report on " + ", ".join(source.name for source in report.study.sources)
    first, _ = leading([chart for chart, _ in figures])
    drawn = {chart.name: _figure(chart, svg) for chart, svg in figures}
    parts = {
        "Verdicts": _verdicts(report.verdicts) + "".join(drawn.pop(chart.name) for chart in first),
        "Results": "".join(_result(report, table) for table in report.layouts),
        "Figures": "".join(drawn.values()),
        "Behind the verdicts": "".join(_folded(table.title, _table(table, True)) for table in report.details),
        "Settings and fingerprints": _settings(report),
        "To reproduce": "".join(_commands(report, source) for source in report.study.sources),
    }
    full = {name: text for name, text in parts.items() if text}
    links = "".join(f'<li><a href="#{_anchor(name)}">{name}</a></li>' for name in full)
    sections = "".join(
        f'<section aria-labelledby="{_anchor(name)}"><h2 id="{_anchor(name)}">{name}</h2>\n{text}</section>\n'
        for name, text in full.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>\n<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{sections}</main>\n<footer><p>Made by kdctl {escape(__version__)}.</p></footer>\n"
        f"<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _verdicts(verdicts: Sequence[str]) -> str:
    """List the verdicts; their leading names, bold in Markdown, are bold here."""
    paragraphs = (re.sub(r"^\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text)) for text in verdict_parts(verdicts))
    return '<ul class="verdicts">' + "".join(f"<li>{text}</li>\n" for text in paragraphs) + "</ul>\n"


def _result(report: Report, table: Table) -> str:
    """Write the columns that people compare, and fold the whole table below where it has more."""
    short, first = shortened(table, report.results), table.name in ("minutes", "main")
    if short.columns == table.columns:
        return _table(table, first)
    whole = replace(table, name=f"{table.name}-all", title=f"{table.title}, all columns")
    return _table(short, first) + _folded("All columns", _table(whole, True))


def _table(table: Table, explained: bool) -> str:
    """Write a table in a box of its own, which scrolls where the page is too narrow; notes folded unless explained."""
    heads = "".join(f'<th scope="col"{_class(column)}>{escape(column.label)}</th>' for column in table.columns)
    bodies = "".join(_body(table, block) for block in table.blocks)
    name = f"table-{escape(table.name)}"
    notes = "".join(f'<p class="notes">{escape(note)}</p>\n' for note in table.notes)
    return (
        f'<div class="box" role="region" aria-labelledby="{name}" tabindex="0">\n<table class="sortable">'
        f'<caption id="{name}">{escape(table.title)}</caption>\n<thead><tr>{heads}</tr></thead>\n{bodies}</table>'
        f"</div>\n{notes if explained or not notes else _folded('How to read this table', notes)}"
    )


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{text}</details>\n"


def _body(table: Table, block: Block) -> str:
    rows = [_row(table.columns, row) for row in block.rows]
    if block.heading:
        heading = f'<th scope="rowgroup" colspan="{len(table.columns)}">{escape(block.heading)}</th>'
        rows.insert(0, f'<tr class="group">{heading}</tr>\n')
    return f"<tbody>{''.join(rows)}</tbody>\n"


def _row(columns: Sequence[Column], cells: Sequence[Cell]) -> str:
    """Write a row; its first cell heads it."""
    written = []
    for index, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        text = escape(show(cell, column.style))
        text = f"<strong>{text}</strong>" if cell.bold else text
        text += "".join(f"<sup>{escape(mark)}</sup>" for mark in cell.marks)
        value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
        tag = 'th scope="row"' if index == 0 else f"td{_class(column, cell)}"
        written.append(f"<{tag}{value}>{text}</{tag.split()[0]}>" if index == 0 else f"<{tag}{value}>{text}</td>")
    return f"<tr>{''.join(written)}</tr>\n"


def _class(column: Column, cell: Cell | None = None) -> str:
    if column.style != "text":
        return ""
    long = cell is not None and len(str(cell.value)) > LONG
    return ' class="text long"' if long else ' class="text"'


def _figure(chart: Chart, svg: str) -> str:
    name, shades = escape(chart.name), ' class="shades"' if isinstance(chart, Maps) else ""
    return (
        f'<figure{shades}><div class="box" role="region" aria-labelledby="figure-{name}" tabindex="0">'
        f"{inline(svg, chart.name)}</div>\n"
        f'<figcaption id="figure-{name}"><strong>{escape(chart.title)}.</strong> {escape(chart.caption)}</figcaption>'
        "</figure>\n"
    )


def inline(svg: str, name: str) -> str:
    """Prepare an SVG file for a page of several: its element alone, labelled by its caption, ids of its own."""
    element = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", element)
    return element.replace("<svg", f'<svg role="img" aria-labelledby="figure-{escape(name)}"', 1)


def _settings(report: Report) -> str:
    """List every setting of every folder and every fingerprint of every model."""
    presets = [
        _facts(f"{source.name}: preset", _flat(source.preset.model_dump(mode="json")))
        for source in report.study.sources
        if source.preset is not None
    ]
    return _table(report.provenance, True) + "".join([*presets, *map(_model, report.study.models)])


def _model(model: Model) -> str:
    pairs: list[tuple[str, object]] = [("folders", ", ".join(model.folders))]
    if model.distilled:
        pairs += _flat(model.distilled.settings, "distill.")
    for name, record in (("training", model.distilled), ("student", model.quantized), ("evaluation", model.result)):
        pairs += _flat(record.model_dump(mode="json", exclude=MEASURED), f"{name}: ") if record else []
    return _facts(f"{model.name}: settings and fingerprints", pairs)


def _flat(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """List the values of nested settings by dotted names."""
    pairs: list[tuple[str, object]] = []
    for key, value in tree.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def _facts(title: str, pairs: Iterable[tuple[str, object]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(_written(value))}</td></tr>\n' for key, value in pairs
    )
    table = f'<table class="facts"><tbody>{rows}</tbody></table>'
    return _folded(title, f'<div class="box" role="region" aria-label="{escape(title)}" tabindex="0">{table}</div>\n')


def _written(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "–" if value is None else str(value)


def _commands(report: Report, source: Source) -> str:
    lines = "\n".join(escape(line) for line in commands(report.study, source))
    return f"<p><code>{escape(str(source.run.path))}</code></p>\n<pre><code>{lines}</code></pre>\n" if lines else ""
