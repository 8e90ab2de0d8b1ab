"""How results, progress and errors look (the only file that imports rich). Results go to stdout, all else to stderr."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kdctl.base.progress import Advance

QUIET_FOR_S = 2.0


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

    def note(self, text: str) -> None:
        """Say one line."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

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


def fail(message: str) -> None:
    """Show an error on stderr."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(Panel(escape(message), title="error", border_style="red", title_align="left"))
    else:
        print(f"error: {message}", file=sys.stderr)


def make_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Lay out a table of results."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def show_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of results on stdout."""
    _stdout().print(make_table(title, header, rows))


def show_text(text: str) -> None:
    """Print plain text on stdout, untouched."""
    print(text, end="" if text.endswith("\n") else "\n")


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values on stdout."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(escape(name), escape(value))
    _stdout().print(table)


def _stdout() -> Console:
    """Make a console for stdout that never cuts a table to a terminal that is not there."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
