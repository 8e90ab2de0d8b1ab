"""Figures on disk: drawn once, anew when they change."""

import os
from pathlib import Path

from kdctl.report.charts import Entry, Forest, ForestPanel, Mark
from kdctl.report.figure_files import link, write_figures


def forest(value: float) -> Forest:
    return Forest("f", "A title", "A caption.", ("",), (ForestPanel("x", (Entry("e", (Mark(value, 0, 9),)),)),))


def test_only_what_changed_or_is_missing_is_drawn(tmp_path: Path) -> None:
    def times() -> list[int]:
        return [(tmp_path / f"f.{ending}").stat().st_mtime_ns for ending in ("svg", "png")]

    ((chart, svg),) = write_figures([forest(1)], tmp_path)
    assert chart == forest(1)
    assert (tmp_path / "f.svg").read_text() == svg
    for path in tmp_path.iterdir():
        os.utime(path, ns=(1, 1))
    assert write_figures([forest(1)], tmp_path) == [(forest(1), svg)]
    assert times() == [1, 1]
    write_figures([forest(2)], tmp_path)
    assert min(times()) > 1
    (tmp_path / "f.png").unlink()
    write_figures([forest(2)], tmp_path)
    assert min(times()) > 1


def test_damaged_figures_are_drawn_anew(tmp_path: Path) -> None:
    write_figures([forest(1)], tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, data in whole.items():
        place = len(data) // 2
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        write_figures([forest(1)], tmp_path)
        assert {each: each.read_bytes() for each in whole} == whole


def test_markdown_shows_a_figure_with_its_caption() -> None:
    assert link(forest(1)) == "![A title](figures/f.svg)\n\n**A title.** A caption."
