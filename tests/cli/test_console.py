"""Results on stdout, everything else on stderr, nothing cut and nothing interpreted."""

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from kdctl.base.progress import Silent
from kdctl.cli import console
from kdctl.cli.console import ConsoleReporter, fail, show_pairs, show_rows, show_text

LONG = "/a/very/long/path/" + "Q" * 200
MARKUP = "[bold]teacher[/bold] [red]0.1[/red] [/oops]"


def test_a_note_is_one_line_on_stderr_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleReporter().note(f"quantize: {LONG} is complete, skipped, and some more words at the end")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"quantize: {LONG} is complete, skipped, and some more words at the end\n"


@pytest.mark.parametrize("show", [lambda text: ConsoleReporter().note(text), fail, show_text])
def test_text_is_shown_as_it_is_without_markup(show, capsys: pytest.CaptureFixture[str]) -> None:
    show(MARKUP)
    out, err = capsys.readouterr()
    assert MARKUP in out + err


def test_an_error_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    fail(f"no model at {LONG}")
    assert capsys.readouterr() == ("", f"error: no model at {LONG}\n")


def test_an_error_on_a_terminal_is_a_panel() -> None:
    ours, theirs = pty.openpty()
    code = "from kdctl.cli.console import fail; fail('lr is [bold] wrong')"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "lr is [bold] wrong" in shown
    assert "╭" in shown
    assert shown.index(" error ") < shown.index("lr is")


def test_a_quick_task_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleReporter().task("quantizing", "layers") as advance:
        advance(1, 2)
        advance(2, 2)
    assert capsys.readouterr() == ("", "")


def test_a_long_task_leaves_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "QUIET_FOR_S", -1.0)
    with ConsoleReporter().task("distilling [v]", "steps") as advance:
        advance(1, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("distilling [v]: ")
    assert err.endswith(" s\n")
    assert err.count("\n") == 1


def test_a_failed_task_passes_its_error_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), ConsoleReporter().task("x") as advance:
        advance(1 // 0, 1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_rate_and_count() -> None:
    reporter, shown = ConsoleReporter(), io.StringIO()
    reporter.console = Console(file=shown, force_terminal=True, width=100)
    with reporter.task("generating", "tokens") as advance:
        advance(3, 7)
    assert "generating" in shown.getvalue()
    assert "3/7" in shown.getvalue()
    assert shown.getvalue().endswith("\x1b[2K"), "the bar is wiped when the task is done"


def test_tables_go_to_stdout_and_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show_rows("errors", ("layer", "error"), [(LONG, "0.1 %"), (MARKUP, "0.2 %")])
    show_pairs("student", [("path", LONG), ("text", MARKUP)])
    out, err = capsys.readouterr()
    assert err == ""
    assert "…" not in out
    assert out.count("Q") == 2 * LONG.count("Q")
    assert out.count("[/oops]") == 2


@pytest.mark.parametrize("text", ["a\n", "a"])
def test_plain_text_ends_in_one_newline(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_text(text)
    assert capsys.readouterr().out == "a\n"


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Silent()
    reporter.note("x")
    with reporter.task("y", "z") as advance:
        advance(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_live_table_is_for_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleReporter().live(lambda: pytest.fail("drawn")):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_live_table_is_redrawn_below_notes() -> None:
    reporter, drawn = ConsoleReporter(), []
    reporter.console = Console(file=io.StringIO(), force_terminal=True, width=80)

    def draw() -> console.Table:
        drawn.append(1)
        return console.make_table("sweep", ["trial", "beta"], [["0", f"{len(drawn)}"]])

    with reporter.live(draw):
        reporter.note("one [note]")
    shown = reporter.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "one [note]" in shown
    assert "beta" in shown
    assert len(drawn) >= 2


def test_a_closed_stdout_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert not console.on_terminal()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_table_in_a_pipe_is_whole_unpadded_and_framed_in_its_encoding(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding, "replace", write_through=True))
    console.show_rows("a title", ("name", "value"), [("x" * 300, "1")])
    lines = pipe.getvalue().decode(encoding).splitlines()
    assert any("x" * 300 in line for line in lines)
    assert lines == [line.rstrip() for line in lines]
    assert "?" not in "".join(lines)
