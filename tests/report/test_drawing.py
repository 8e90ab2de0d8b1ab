"""Figures as they are drawn: whole, legible, the same every time, and true to their numbers."""

import re
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from kdctl.report.charts import Chart, Entry, Forest, ForestPanel, Maps, Mark, Panel, Planes, Point, Series
from kdctl.report.columns import Results
from kdctl.report.drawing import COLORS, MARKERS, STYLE, draw, render
from kdctl.report.figures import figures

NAMES = ["minutes", "verdicts", "changes", "accuracy"]
NAMES += ["learning-rate", "grid", "training", "writers", "recovery", "cost"]
LONG = "a name of one's own that is much longer than any that kdctl makes, <b>$\\alpha_1$</b> & more"
OWN = [
    Forest(
        "own", "t", "c", (LONG, "b"), tuple(ForestPanel(f"{n}, %", (Entry(LONG, (Mark(1), None)),)) for n in "abcdefg")
    ),
    Planes("own", "t", "c", ((Panel(LONG, "x", "y", (Series(LONG, (Point(1, Mark(1, 0.5, 2)),)),), log_x=True),),)),
]


@pytest.fixture(scope="session")
def charts(full: Results) -> dict[str, Chart]:
    return {chart.name: chart for chart in figures(full)}


@pytest.fixture(scope="session")
def figure_of(charts: dict[str, Chart]) -> dict[str, Figure]:
    return {name: drawn(chart) for name, chart in charts.items()}


def drawn(chart: Chart) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = draw(chart)
        FigureCanvasAgg(figure).draw()
    return figure


def texts(figure: Figure) -> list[Any]:
    """List the texts that are seen."""
    axes = [axis for axis in figure.axes if axis.get_visible()]
    own = [text for axis in axes for text in [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]]
    own += [label for axis in axes for side in (axis.xaxis, axis.yaxis) for label in ticks(side)]
    own += [text for legend in figure.legends for text in legend.get_texts()]
    return [text for text in own if text.get_text()]


def ticks(side: Axis) -> list[Any]:
    """List the labels of one side of a panel; those beyond its ends are not drawn."""
    low, high = sorted(side.get_view_interval())
    return [one.label1 for one in side.get_major_ticks() if low <= one.get_loc() <= high and one.label1.get_visible()]


def intervals(axis: Axes) -> list[tuple[float, ...]]:
    """List the ends of all intervals of a panel, as they were drawn."""
    found = []
    for container in axis.containers:
        if isinstance(container, ErrorbarContainer):
            for lines in container.lines[2]:
                segments = lines.get_segments()
                along = 0 if container.has_xerr else 1
                found += [tuple(np.asarray(segment)[:, along]) for segment in segments]
    return found


def known(marks: list[Mark | None]) -> list[tuple[float, ...]]:
    return [(one.low, one.high) for one in marks if one and one.low is not None and one.high is not None]


@pytest.mark.parametrize("name", ["grid", "recovery", "cost"])
def test_equal_charts_are_equal_bytes(charts: dict[str, Chart], name: str) -> None:
    first, second = render(charts[name], "id"), render(charts[name], "id")
    assert first == second
    assert first["png"].startswith(b"\x89PNG")
    root = ElementTree.fromstring(first["svg"])
    assert root.tag.endswith("svg")
    assert not re.search(rb"dc:date|20\d\d-\d\d-\d\d|matplotlib\.org/\"", first["svg"])


def test_labels_are_text(charts: dict[str, Chart]) -> None:
    svg = render(charts["accuracy"], "id")["svg"].decode()
    assert all(word in svg for word in ("teacher", "on-policy", "λ 1, β 1, lr 0.0001, seed 0", "average of tasks, %"))


@pytest.mark.parametrize("chart", [*NAMES, *OWN], ids=[*NAMES, "long-forest", "long-planes"])
def test_nothing_is_cut_off_and_no_text_overlaps(figure_of: dict[str, Figure], chart: Chart | str) -> None:
    figure = figure_of[chart] if isinstance(chart, str) else drawn(chart)
    whole = figure.bbox.padded(1)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert len(boxes) > 3
    outside = [text for text, box in boxes if not (whole.contains(*box.min) and whole.contains(*box.max))]
    assert outside == []
    shrunk = [(text, box.padded(-1)) for text, box in boxes]
    assert [(a, b) for (a, one), (b, other) in combinations(shrunk, 2) if one.overlaps(other)] == []


@pytest.mark.parametrize("name", ["verdicts", "changes", "accuracy", "writers", "recovery"])
def test_a_forest_draws_the_intervals_that_it_is_given(
    charts: dict[str, Chart], figure_of: dict[str, Figure], name: str
) -> None:
    chart = charts[name]
    assert isinstance(chart, Forest)
    for axis, panel in zip(figure_of[name].axes, chart.panels, strict=True):
        expected = known([one for entry in panel.entries for one in entry.marks])
        assert len(expected) > 5
        np.testing.assert_allclose(sorted(intervals(axis)), sorted(expected), rtol=1e-12)


@pytest.mark.parametrize("name", ["learning-rate", "training", "cost"])
def test_planes_draw_the_intervals_that_they_are_given(
    charts: dict[str, Chart], figure_of: dict[str, Figure], name: str
) -> None:
    chart = charts[name]
    assert isinstance(chart, Planes)
    seen = [axis for axis in figure_of[name].axes if axis.get_visible()]
    for axis, panel in zip(seen, [panel for row in chart.rows for panel in row], strict=True):
        expected = known([point.y for series in panel.series for point in series.points])
        found = [ends for ends in intervals(axis) if ends[0] != ends[1]]
        np.testing.assert_allclose(sorted(found), sorted(expected), rtol=1e-12)


def test_a_grid_writes_its_numbers_and_outlines_what_is_distinguishable(
    charts: dict[str, Chart], figure_of: dict[str, Figure]
) -> None:
    chart = charts["grid"]
    assert isinstance(chart, Maps)
    for axis, found in zip(figure_of["grid"].axes, chart.maps, strict=True):
        written = {
            (round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axis.texts[::2]
        }
        assert written.keys() == found.cells.keys()
        outlined = 0
        for place, cell in found.cells.items():
            better = (cell.mark.value > 0) == found.more_is_better
            arrow = (" ↑" if better else " ↓") if cell.distinguishable else ""
            assert written[place] == f"{cell.mark.value:+.{found.digits}f}{arrow}"
            outlined += cell.distinguishable
        assert sum(not patch.get_fill() for patch in axis.patches) == outlined > 0


def test_an_interval_that_leaves_the_panel_ends_in_an_arrow() -> None:
    panel = ForestPanel("share, %", (Entry("v", (Mark(50, -400, 900),)),), 0.0, (-50, 150))
    axis = drawn(Forest("f", "t", "c", ("",), (panel,))).axes[0]
    assert axis.get_xlim() == (-50, 150)
    arrows = [line for line in axis.lines if line.get_marker() in ("<", ">")]
    assert [(line.get_marker(), *np.asarray(line.get_xdata())) for line in arrows] == [("<", -50), (">", 150)]


def test_what_was_not_measured_is_said_in_its_place() -> None:
    panel = ForestPanel("share, %", (Entry("v", (None,), "no share"), Entry("w", (Mark(1, 0, 2),))))
    assert [text.get_text() for text in drawn(Forest("f", "t", "c", ("",), (panel,))).axes[0].texts] == ["no share"]


def test_styles_differ_without_their_colors() -> None:
    assert len(set(MARKERS)) == len(MARKERS) == len(COLORS)


def test_text_is_never_taken_for_mathematics() -> None:
    assert "$\\alpha_1$" in render(OWN[0], "id")["svg"].decode()
