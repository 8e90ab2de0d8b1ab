"""Charts to SVG and PNG, the same bytes every time (the only file importing matplotlib)."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator

from kdctl.report.charts import Band, Cell, Chart, Forest, ForestPanel, Map, Maps, Mark, Panel, Planes, Series

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "kdctl",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "hatch.color": "0.6",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
COLORS = ("#000000", "#0072b2", "#b34700", "#00694d", "#7b3f8c", "#555555", "#8a6d00", "#a3003d")
DPI = 150
MAX_COLUMNS = 6
LINE_INCHES = 0.23
LETTER_INCHES = 0.075
TITLE_LETTERS = 46
DARK = 0.45


def render(chart: Chart, identity: str) -> dict[str, bytes]:
    """Draw a chart; returns the contents of its files by ending, ``svg``, which holds the identity, and ``png``."""
    with matplotlib.rc_context(STYLE):
        figure = draw(chart)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # what it has laid out stays, and is not laid out again for each file
        return {
            "svg": _saved(figure, "svg", {"Date": None, "Creator": None, "Title": chart.title, "Identifier": identity}),
            "png": _saved(figure, "png", {"Software": None}),
        }


def _saved(figure: Figure, form: str, metadata: dict[str, str | None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def draw(chart: Chart) -> Figure:
    """Draw a chart as a figure that no window shows."""
    if isinstance(chart, Forest):
        return _forest(chart)
    return _planes(chart) if isinstance(chart, Planes) else _maps(chart)


def _forest(chart: Forest) -> Figure:
    count = len(chart.panels)
    rows = -(-count // MAX_COLUMNS)
    columns = -(-count // rows)
    lines = len(chart.panels[0].entries)
    names = max(len(entry.label) for entry in chart.panels[0].entries)
    widest = max(len(panel.label) for panel in chart.panels)
    width = LETTER_INCHES * names + columns * max(1.55 if columns > 1 else 4.2, LETTER_INCHES * widest + 0.2)
    thick = LINE_INCHES * (1 + 0.25 * (len(chart.series) - 1))
    figure = Figure((width, rows * (thick * lines + 0.6) + 0.25), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for index, axis in enumerate(axes.flat):
        if index < count:
            _forest_panel(axis, chart.panels[index], len(chart.series))
        else:
            axis.set_visible(False)
    for axis in axes[:, 0]:
        _name_entries(axis, chart.panels[0])
    if len(chart.series) > 1:
        _legend(figure, {name: axes[0][0].errorbar([], [], [], **_marker(at)) for at, name in enumerate(chart.series)})
    return figure


def _legend(figure: Figure, shown: dict[str, Any]) -> None:
    """Put the legend below, in as many columns as fit, and let the figure grow by its lines after the first."""
    fitting = int(figure.get_figwidth() / (LETTER_INCHES * max(map(len, shown)) + 0.6))
    columns = max(1, min(fitting, len(shown)))
    figure.set_figheight(figure.get_figheight() + LINE_INCHES * (math.ceil(len(shown) / columns) - 1))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _forest_panel(axis: Axes, panel: ForestPanel, series: int) -> None:
    limits = _reached(panel)
    for index in range(series):
        lines = [(line, entry.marks[index]) for line, entry in enumerate(panel.entries) if entry.marks]
        known = [(line + 0.24 * (index - (series - 1) / 2), one) for line, one in lines if one is not None]
        _intervals(axis, known, index, limits)
    for line, entry in enumerate(panel.entries):
        if entry.marks and not any(entry.marks) and entry.note:
            axis.text(0.5, line, entry.note, transform=axis.get_yaxis_transform(), ha="center", va="center", size=7)
    if panel.reference is not None:
        axis.axvline(panel.reference, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
        if panel.margin is not None:
            low, high = panel.reference - panel.margin, panel.reference + panel.margin
            axis.axvspan(low, high, facecolor="0.92", edgecolor="none", zorder=-1)
    if limits:
        axis.set_xlim(*limits)
    axis.set_xlabel(panel.label)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(axis="y", length=0, pad=7)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)


def _reached(panel: ForestPanel) -> tuple[float, float] | None:
    """Return the limits of a panel if any interval reaches beyond them."""
    if panel.limits is None:
        return None
    ends = [end for entry in panel.entries for one in entry.marks if one for end in (one.low, one.high, one.value)]
    inside = all(end is None or panel.limits[0] <= end <= panel.limits[1] for end in ends)
    return None if inside else panel.limits


def _intervals(axis: Axes, known: Sequence[tuple[float, Mark]], style: int, limits: tuple[float, float] | None) -> None:
    """Draw values and their intervals along x, at heights y, with arrows where they leave the panel."""
    marks = [one for _, one in known]
    axis.errorbar([one.value for one in marks], [y for y, _ in known], xerr=_reach(marks), **_marker(style))
    if limits is None:
        return
    for y, one in known:
        for end, limit, arrow in ((one.low, limits[0], "<"), (one.high, limits[1], ">")):
            if end is not None and (end < limit if arrow == "<" else end > limit):
                axis.plot([limit], [y], marker=arrow, color=COLORS[style % len(COLORS)], markersize=5, clip_on=False)


def _name_entries(axis: Axes, panel: ForestPanel) -> None:
    """Label the lines from the top down, headings in bold."""
    axis.set_yticks(range(len(panel.entries)), [entry.label for entry in panel.entries])
    axis.set_ylim(len(panel.entries) - 0.4, -0.6)
    for label, entry in zip(axis.get_yticklabels(), panel.entries, strict=True):
        label.set_fontweight("normal" if entry.marks else "bold")


def _marker(index: int) -> dict[str, Any]:
    """Return a style that is told from others without colors: by shape, and every second one is hollow."""
    color = COLORS[index % len(COLORS)]
    return {
        "fmt": MARKERS[index % len(MARKERS)],
        "color": color,
        "markerfacecolor": "white" if index % 2 else color,
        "markersize": 5,
        "elinewidth": 1.2,
        "capsize": 2.5,
    }


def _reach(marks: Sequence[Mark]) -> list[list[float]]:
    """Return how far intervals reach below and above their values, (2, N); 0 where there is none."""
    below = [0.0 if one.low is None else one.value - one.low for one in marks]
    above = [0.0 if one.high is None else one.high - one.value for one in marks]
    return [below, above]


def _planes(chart: Planes) -> Figure:
    rows, columns = len(chart.rows), max(len(row) for row in chart.rows)
    labels = list(dict.fromkeys(part.label for row in chart.rows for panel in row for part in panel.series))
    width = 1.0 + max(3.0 * columns, 3.6, LETTER_INCHES * max(map(len, labels)))
    figure = Figure((width, 2.3 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, sharey="row", squeeze=False)
    shown: dict[str, Any] = {}
    for line, panels in zip(axes, chart.rows, strict=True):
        for column, axis in enumerate(line):
            if column < len(panels):
                shown |= _panel(axis, panels[column], labels)
                axis.set_ylabel(panels[column].y_label if column == 0 else "")
            else:
                axis.set_visible(False)
    _legend(figure, shown)
    return figure


def _panel(axis: Axes, panel: Panel, labels: Sequence[str]) -> dict[str, Any]:
    """Draw a panel and return what the legend shows, by label."""
    shown = {band.label: _band(axis, band) for band in panel.bands}
    shown |= {part.label: _series(axis, part, labels.index(part.label)) for part in panel.series if part.points}
    axis.set_title(textwrap.fill(panel.title, TITLE_LETTERS))
    axis.set_xlabel(panel.x_label)
    if panel.log_x:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axis.set_xlim(left=-0.02 * max(point.x for part in panel.series for point in part.points))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if panel.ticks:
        axis.set_xticks(panel.ticks, [_number(tick) for tick in panel.ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(x=0.12)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    return shown


def _number(value: float) -> str:
    """Write a small round number with an exponent, others in full."""
    power = f"{value:.0e}"
    return power.replace("e-0", "e-") if value < 0.01 and float(power) == value else f"{value:g}"


def _band(axis: Axes, band: Band) -> Any:
    """Draw a level across the panel, hatched as far as its interval reaches."""
    line = axis.axhline(band.y.value, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
    if band.y.low is None or band.y.high is None:
        return line
    style = {"facecolor": "none", "edgecolor": "0.75", "hatch": "////", "linewidth": 0.0}
    return axis.axhspan(band.y.low, band.y.high, zorder=0, **style)


def _series(axis: Axes, part: Series, index: int) -> Any:
    x, marks = [point.x for point in part.points], [point.y for point in part.points]
    if part.faint:
        return axis.plot(x, [one.value for one in marks], color="0.6", linewidth=0.7)[0]
    line = LINES[(index + index // len(MARKERS)) % len(LINES)]  # shapes repeat, then with another line
    style = _marker(index) | {"linestyle": line if part.joined else "none", "linewidth": 1}
    return axis.errorbar(x, [one.value for one in marks], yerr=_reach(marks), **style)


def _maps(chart: Maps) -> Figure:
    count = len(chart.maps)
    columns = min(count, 2)
    rows = -(-count // columns)
    wide = max(len(found.columns) for found in chart.maps)
    high = max(len(found.rows) for found in chart.maps)
    figure = Figure((columns * (1.25 * wide + 0.9), rows * (0.62 * high + 0.9)), layout="constrained")
    for index, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if index < count:
            _map(axis, chart.maps[index])
        else:
            axis.set_visible(False)
    return figure


def _map(axis: Axes, found: Map) -> None:
    """Draw cells from dark (worse) to light (better), mid-grey where there is no difference."""
    most = max(abs(cell.mark.value) for cell in found.cells.values()) or 1.0
    for row in range(len(found.rows)):
        for column in range(len(found.columns)):
            cell = found.cells.get((row, column))
            if cell is None:
                axis.add_patch(_square(row, column, facecolor="white", edgecolor="0.7", hatch="xx"))
            else:
                _cell(axis, (row, column), cell, found.digits, (1 if found.more_is_better else -1) / most)
    axis.set_title(found.title)
    axis.set_xlabel(found.x_label)
    axis.set_ylabel(found.y_label)
    axis.set_xticks(range(len(found.columns)), found.columns)
    axis.set_yticks(range(len(found.rows)), found.rows)
    axis.set_xlim(-0.5, len(found.columns) - 0.5)
    axis.set_ylim(-0.5, len(found.rows) - 0.5)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _cell(axis: Axes, place: tuple[int, int], cell: Cell, digits: int, worth: float) -> None:
    """Write a difference and its interval on a shade of what it is worth, -1 to 1 after multiplication."""
    row, column = place
    shade = 0.5 + 0.5 * worth * cell.mark.value
    ink = "white" if shade < DARK else "black"
    axis.add_patch(_square(row, column, facecolor=matplotlib.colormaps["cividis"](shade), edgecolor="white"))
    arrow = ""
    if cell.distinguishable:
        arrow = " ↑" if shade > 0.5 else " ↓"
        axis.add_patch(_square(row, column, 0.45, fill=False, edgecolor=ink, linewidth=2))
    axis.text(column, row + 0.03, f"{cell.mark.value:+.{digits}f}{arrow}", color=ink, ha="center", va="bottom")
    if cell.mark.low is not None and cell.mark.high is not None:
        interval = f"{cell.mark.low:+.{digits}f} to {cell.mark.high:+.{digits}f}"
        axis.text(column, row - 0.08, interval, color=ink, ha="center", va="top", size=6.5)


def _square(row: int, column: int, half: float = 0.5, **style: Any) -> Rectangle:
    return Rectangle((column - half, row - half), 2 * half, 2 * half, **style)
