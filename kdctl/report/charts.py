"""What figures show, before anything is drawn: numbers with 95 % intervals, labels and captions."""

from dataclasses import dataclass

from kdctl.run.records import Estimate


@dataclass(frozen=True)
class Mark:
    """A number and its 95 % interval, which is missing where nothing was kept that it could be computed from."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Entry:
    """One line of a forest plot: a mark for each series, None where it was not measured; a heading has no mark."""

    label: str
    marks: tuple[Mark | None, ...] = ()
    note: str = ""
    """Stands in the place of marks that are not there."""


@dataclass(frozen=True)
class ForestPanel:
    """Marks of the same entries along one axis. reference: a value to draw a line at."""

    label: str
    entries: tuple[Entry, ...]
    reference: float | None = None
    limits: tuple[float, float] | None = None
    """Ends of the axis where intervals may reach far beyond what matters; arrows say that they do."""
    margin: float | None = None
    """Half the width of a shaded band around the reference, within which differences are too small to matter."""


@dataclass(frozen=True)
class Forest:
    """Panels side by side whose lines bear the same labels."""

    name: str
    title: str
    caption: str
    series: tuple[str, ...]
    panels: tuple[ForestPanel, ...]


@dataclass(frozen=True)
class Point:
    """A place in a plane; the interval is of y."""

    x: float
    y: Mark


@dataclass(frozen=True)
class Series:
    """Points of one kind. faint: many points of which only the course matters."""

    label: str
    points: tuple[Point, ...]
    joined: bool = True
    faint: bool = False


@dataclass(frozen=True)
class Band:
    """A level to compare with, and its interval."""

    label: str
    y: Mark


@dataclass(frozen=True)
class Panel:
    """Series in one plane."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    bands: tuple[Band, ...] = ()
    log_x: bool = False
    ticks: tuple[float, ...] = ()
    """Places of x that get a label; chosen by the axis if empty."""


@dataclass(frozen=True)
class Planes:
    """Rows of panels, the last one perhaps shorter; the panels of a row have one y axis."""

    name: str
    title: str
    caption: str
    rows: tuple[tuple[Panel, ...], ...]


@dataclass(frozen=True)
class Cell:
    """A difference; distinguishable: it is not only noise."""

    mark: Mark
    distinguishable: bool


@dataclass(frozen=True)
class Map:
    """Differences over two settings, by (row, column); places without a model are not in ``cells``."""

    title: str
    x_label: str
    y_label: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: dict[tuple[int, int], Cell]
    digits: int
    more_is_better: bool


@dataclass(frozen=True)
class Maps:
    """Heat maps side by side."""

    name: str
    title: str
    caption: str
    maps: tuple[Map, ...]


Chart = Forest | Planes | Maps


def mark(estimate: Estimate, factor: float = 1.0) -> Mark:
    """Scale an estimate, as to percent; a negative factor turns its interval round."""
    low, high = sorted((factor * estimate.low, factor * estimate.high))
    return Mark(factor * estimate.value, low, high)
