"""What a person sees of a report on a terminal, and that a pipe gets Markdown whatever colors are forced."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from made_up import make_run
from typer.testing import CliRunner

from kdctl.cli.app import app
from kdctl.cli.report import show_report
from kdctl.report.front import Excerpt, write_report
from kdctl.report.tables import show_parts
from kdctl.run.paths import RunDir

WIDTHS = (60, 80, 120)
STYLES = re.compile(r"\x1b\[[0-9;]*m")
LONG = "lambda1_beta1_lr0.0001_seed0"
Shown = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("shown") / "run", {LONG: {"share": 0.75, "kl": 0.1}})


@pytest.fixture(scope="module")
def found(run: RunDir) -> Excerpt:
    return write_report([run], figures=False)


def opened(width: int) -> tuple[int, int]:
    """Open a terminal of a width, without a program on it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    return ours, theirs


def read(ours: int) -> str:
    text = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # that is how a terminal ends
            break
        if not more:
            break
        text += more
    os.close(ours)
    return text.decode().replace("\r\n", "\n")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Run a function with stdout on a terminal and return what it wrote."""

    def show(work: Callable[[], None], width: int, **variables: str) -> str:
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"TERM": "xterm-256color"} | variables).items():
            monkeypatch.setenv(name, value)
        ours, theirs = opened(width)
        with ThreadPoolExecutor(1) as reader:
            text = reader.submit(read, ours)
            with open(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", terminal)
                patch.setattr(sys, "__stdout__", terminal)
                work()
            return text.result()

    return show


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_line_is_longer_than_the_terminal(found: Excerpt, shown: Shown, width: int, wide: bool, kind: dict) -> None:
    text = shown(lambda: show_report(found, wide), width, **kind)
    path = str(found.folder)
    assert [line for line in STYLES.sub("", text).split("\n") if len(line) > width and path not in line] == []
    assert "…" not in text
    assert ("\x1b" in text) == (kind.get("TERM") != "dumb")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text) or not kind


@pytest.mark.parametrize("width", WIDTHS)
def test_the_columns_that_people_compare_are_there_whole(found: Excerpt, shown: Shown, width: int) -> None:
    table, told, *_ = STYLES.sub("", shown(lambda: show_report(found), width)).split("\n\n")
    for label in ("model", "KL to teacher", "average", "verdict", "MiB"):
        assert label in table
    (whole,) = found.tables
    for column, *cells in zip(whole.columns, *whole.rows, strict=True):
        if column.key in ("forward_kl", "average", "size_bytes"):
            assert all(part in table for cell in cells for part in show_parts(cell, column.style))
    assert [one.model for one in found.headlines] == ["ptq", LONG]
    assert " ".join(told.split()) == " ".join(f"{one.model}: {one.words}" for one in found.headlines)


def test_wide_shows_every_column_of_the_whole_table(found: Excerpt, shown: Shown) -> None:
    text = STYLES.sub("", shown(lambda: show_report(found, wide=True), 80))
    (table,) = found.tables
    for column in table.columns:
        assert column.label in text
    assert text.count(LONG) > 3


def test_why_there_is_no_report_is_a_paragraph(shown: Shown) -> None:
    assert shown(lambda: show_report(Excerpt(("no report: asked otherwise",))), 60) == "no report: asked otherwise\n"


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "60"}])
@pytest.mark.parametrize("options", [[], ["--wide"], ["--table", "markdown"]])
def test_a_pipe_gets_markdown(run: RunDir, found: Excerpt, variables: dict[str, str], options: list[str]) -> None:
    done = CliRunner().invoke(app, ["report", str(run.path), "--no-figures", *options], env=variables)
    assert (done.exit_code, done.stdout) == (0, found.text())
    assert not (run.report / "figures").exists()


def test_the_command_itself_on_a_terminal(run: RunDir, found: Excerpt, tmp_path: Path) -> None:
    ours, theirs = opened(100)
    command = [sys.executable, "-m", "kdctl", "report", run.path, "--no-figures", "--out", tmp_path]
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=variables | {"TERM": "xterm"})
    os.close(theirs)
    text = STYLES.sub("", read(ours))
    assert child.wait() == 0
    assert "| model |" not in text
    assert "PTQ: better;" in text
    assert str(tmp_path / "report.html") in text.replace("\n", "")
