"""Figures on disk, drawn only where they are not there yet."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kdctl.base.version import __version__
from kdctl.report.charts import Chart
from kdctl.run.files import write_bytes


def write_figures(charts: Sequence[Chart], folder: Path) -> list[tuple[Chart, str]]:
    """Write each chart as ``<name>.svg`` and ``<name>.png`` and return it with its SVG."""
    return [(chart, _written(chart, folder)) for chart in charts]


def _written(chart: Chart, folder: Path) -> str:
    """Draw a chart unless the files are those of the same chart already; drawing takes a second."""
    vector, raster = (folder / f"{chart.name}.{ending}" for ending in ("svg", "png"))
    identity = hashlib.sha256(f"{__version__} {chart!r}".encode()).hexdigest()
    if vector.exists() and raster.exists() and identity in (text := vector.read_text(encoding="utf-8")):
        return text
    from kdctl.report.drawing import render

    files = render(chart, identity)
    write_bytes(raster, files["png"])
    write_bytes(vector, files["svg"])
    return files["svg"].decode()


def link(chart: Chart) -> str:
    """Show a figure in Markdown that lies beside the folder of figures."""
    return f"![{chart.title}](figures/{chart.name}.svg)\n\n**{chart.title}.** {chart.caption}"
