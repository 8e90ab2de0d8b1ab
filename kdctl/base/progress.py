"""What a stage tells its user while it works, without knowing how it is shown."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int, int], None]
"""Called with (done, total)."""


def ignore(done: int, total: int) -> None:
    """Take notice of no progress."""


class Reporter(Protocol):
    """Receives notes and progress. ``console.py`` shows them; a library user may pass ``Silent()``."""

    def note(self, text: str) -> None:
        """Say one line."""
        ...

    def task(self, label: str, unit: str = "") -> AbstractContextManager[Advance]:
        """Open a progress bar that the returned function moves."""
        ...


class Silent:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        """Drop a line."""

    @contextmanager
    def task(self, label: str, unit: str = "") -> Iterator[Advance]:
        """Drop progress."""
        yield lambda done, total: None
