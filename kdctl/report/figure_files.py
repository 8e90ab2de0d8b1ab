"""Figures on disk, drawn only where they are not there yet."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kdctl.base.version import __version__
from kdctl.report.charts import Chart
from kdctl.run.files import read_bytes, write_bytes

MARK = b"<!-- sha256 "


def write_figures(charts: Sequence[Chart], folder: Path) -> list[tuple[Chart, str]]:
    """Write each chart as ``<name>.svg`` and ``<name>.png`` and return it with its SVG."""
    return [(chart, _written(chart, folder)) for chart in charts]


def _written(chart: Chart, folder: Path) -> str:
    """Draw a chart unless the files are whole and of the same chart already; drawing takes a second."""
    vector, raster = (folder / f"{chart.name}.{ending}" for ending in ("svg", "png"))
    identity = hashlib.sha256(f"{__version__} {chart!r}".encode()).hexdigest()
    if vector.is_file() and raster.is_file():
        text, image = read_bytes(vector), read_bytes(raster)
        body, mark, end = text.rpartition(MARK)
        if identity.encode() in body and mark + end == _seal(body, image):
            return text.decode()
    from kdctl.report.drawing import render

    files = render(chart, identity)
    text = files["svg"] + _seal(files["svg"], files["png"])
    write_bytes(raster, files["png"])
    write_bytes(vector, text)
    return text.decode()


def _seal(body: bytes, image: bytes) -> bytes:
    """Return the comment at the end of an SVG that says what it and the PNG beside it are, so that damage is seen."""
    return MARK + hashlib.sha256(body + image).hexdigest().encode() + b" -->\n"


def link(chart: Chart) -> str:
    """Show a figure in Markdown that lies beside the folder of figures."""
    return f"![{chart.title}](figures/{chart.name}.svg)\n\n**{chart.title}.** {chart.caption}"
