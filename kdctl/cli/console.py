"""How results, progress and errors look (the only file that imports rich). Results go to stdout, all else to stderr."""

import io
import json
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len as cell_len
from rich.cells import chop_cells as chop_cells
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kdctl.base.progress import Advance

QUIET_FOR_S = 2.0
INDENT = "  "
PLAIN = "\n\t\u00a0\u200c\u200d"
"""Characters that are not printable, and do no harm: white space, and joiners within words and emoji."""
ENDLESS = 100_000
"""Characters a line, where nothing is cut."""


@dataclass(frozen=True)
class ShownColumn:
    """A column as it stands on a terminal: cells with their line breaks, none of a line wider than ``width``."""

    label: str
    lines: tuple[str, ...]
    bold: tuple[bool, ...]
    width: int
    words: bool
    """Words stand on the left, numbers on the right."""


class RateColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        """Show the current rate."""
        rate = task.finished_speed or task.speed
        return Text(f"{rate:.3g} {task.fields['unit']}/s" if rate else "", style="progress.data.speed")


class ConsoleReporter:
    """Shows notes and progress on stderr. Where stderr is no terminal, one line a finished task."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        """Say one line, once: several stages of a command may find the same."""
        if text in self._said:
            return
        self._said.add(text)
        self.console.print(escape(visible(text)), highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str, unit: str = "") -> Iterator[Advance]:
        """Show a bar with rate and time left; keep a line of it when it took over two seconds."""
        started = time.monotonic()
        with self._bar() as progress:
            bar = progress.add_task(escape(label), total=None, unit=unit)
            yield lambda done, total: progress.update(bar, completed=done, total=total)
        seconds = time.monotonic() - started
        if seconds > QUIET_FOR_S:
            self.note(f"{label}: {seconds:.1f} s")

    @contextmanager
    def live(self, draw: Callable[[], Table]) -> Iterator[None]:
        """Keep a table up to date below notes and bars; nothing where stderr is no terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=draw, console=self.console, refresh_per_second=1, transient=True):
            yield

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )


def visible(text: str) -> str:
    """Return words as one line that a terminal shows as it stands: names may hold line breaks and escape sequences."""
    return harmless(re.sub(r"\s*\n\s*", " ", text.strip()))


def harmless(text: str) -> str:
    """Return text, of a data set or a model, whose control characters a terminal shows and does not obey."""
    return "".join(c if c.isprintable() or c in PLAIN else c.encode("unicode_escape").decode() for c in text)


def fail(message: str) -> None:
    """Show an error on stderr."""
    console, message = Console(stderr=True), visible(message)
    if console.is_terminal:
        console.print(Panel(escape(message), title="error", border_style="red", title_align="left"))
    else:
        print(f"error: {message}", file=sys.stderr)


def make_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Lay out a table of results."""
    table = Table(title=escape(harmless(title)), title_justify="left", header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(harmless(cell)) for cell in row))
    return table


def show_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of results on stdout."""
    _show_table(make_table(title, header, rows))


def on_terminal() -> bool:
    """Tell whether a person reads stdout; whatever colors are forced, a pipe or a file is none."""
    return sys.stdout is not None and sys.stdout.isatty()


def terminal_width() -> int:
    """Return how many characters a line of stdout holds."""
    return shutil.get_terminal_size().columns


def show_columns(title: str, columns: Sequence[ShownColumn], gap: int) -> None:
    """Print columns on stdout, ``gap`` spaces between them, without cutting any that stands out."""
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),
    )
    for column in columns:
        table.add_column(column.label, justify="left" if column.words else "right", width=column.width)
    for index in range(len(columns[0].lines)):
        table.add_row(*(Text(one.lines[index], "bold" if one.bold[index] else "") for one in columns))
    total = sum(column.width for column in columns) + gap * (len(columns) - 1)
    _wide(max(terminal_width(), total)).print(table)


def show_paragraph(text: str, name: str = "", style: str = "") -> None:
    """Print words on stdout, after a name in bold, on lines that fit and of which all but the first are indented."""
    whole = (f"{name}: {text}" if name else text).replace(" %", "\u00a0%")
    wrapper = textwrap.TextWrapper(terminal_width(), break_long_words=False, break_on_hyphens=False)
    wrapper.subsequent_indent = INDENT if name else ""
    shown = Text(wrapper.fill(whole).replace("\u00a0", " "), style)
    shown.stylize("bold", 0, len(name))
    _wide(terminal_width()).print(shown, soft_wrap=True)


def show_text(text: str) -> None:
    """Print plain text on stdout, untouched."""
    print(text, end="" if text.endswith("\n") else "\n")


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values on stdout."""
    table = Table(
        title=escape(harmless(title)), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    for _ in range(2):
        table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(escape(harmless(name)), escape(harmless(value)))
    _show_table(table)


def show_json(text: str) -> None:
    """Print JSON on stdout, with escapes for characters that its encoding has not."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2)
    show_text(text)


def _wide(width: int) -> Console:
    """Make a console for stdout of a width, which a dumb terminal would not be asked for unless the height is given."""
    return Console(width=width, height=shutil.get_terminal_size().lines)


def _show_table(table: Table) -> None:
    """Print a table on stdout: fitted to a terminal, but whole and without padding anywhere else."""
    if (console := Console()).is_terminal:
        console.print(table)
        return
    encoding = sys.stdout.encoding or "utf-8"  # which decides what frames are drawn with
    drawn = io.BytesIO()
    with io.TextIOWrapper(drawn, encoding, "replace") as file:
        Console(file=file, width=ENDLESS).print(table)
        file.flush()
        lines = drawn.getvalue().decode(encoding).splitlines()
    for line in lines:
        print(line.rstrip())
