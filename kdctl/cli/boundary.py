"""Between kdctl and whoever runs it: every command starts and ends here, ``python -m kdctl`` and workers too.

Whatever input, disk, network or memory may do ends in one message and exit code 2. Anything else is a bug of kdctl: it
says so, and leaves a file to attach to a report (exit code 70). Nothing heavy and no dependency is imported before
somebody listens to Ctrl-C and can say what is missing.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from itertools import pairwise
from typing import Any

from kdctl.base import stopping
from kdctl.base.errors import KdctlError

INPUT, BUG, BROKEN_PIPE = 2, 70, 141
PLACES = ("--run", "-r", "--out", "-o")
STREAMS = {1: "standard output", 2: "standard error"}


class Known:
    """What is known of the command that runs, for the file that is written for a bug."""

    folder: Any = None
    preset: str = ""
    verbose: bool = False
    said: bool = False
    unread: bool = False
    """The reader of stdout or stderr has gone, as ``head`` does."""
    made: Any = None
    """The context of a run folder that the command made."""


def main() -> None:
    """Run the command line and exit: 0; 1 where verify failed; 2 for a mistake; 70 for a bug; 75 where training was
    preempted; 128 + a signal's number.

    Only the main one of several processes prints results.
    """
    try:
        _open_streams()
        stopping.listen(_last_words)
        code = _run()
    except BaseException as error:  # noqa: BLE001 - this is where everything ends
        code = end(error)
    code = _flush(code)
    stopping.finish()
    sys.exit(code)


def _run() -> int:
    """Import the commands and run the one that is asked for. Returns the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - a source tree has no installer that looks
        raise KdctlError(f"kdctl needs Python 3.11 or later, and this is {sys.version.split()[0]}")
    for before, word in pairwise(sys.argv):
        check_text(word)
        if (before in PLACES and not word) or word in [f"{place}=" for place in PLACES]:
            raise KdctlError(f"{word or before} names no folder: what it was to be is empty, like a variable not set")
    if parent := os.environ.pop(stopping.PARENT, ""):
        stopping.end_with(int(parent))
    from kdctl.cli.app import app

    try:
        app(prog_name="kdctl")
    except SystemExit as ended:
        if (stopped := stopping.received()) and not Known.said and ended.code:
            raise stopped from None
        code = ended.code if isinstance(ended.code, int) else 0
        return BROKEN_PIPE if code and Known.unread else code
    return 0


def check_text(word: str) -> None:
    """Raise KdctlError for a word of the command line whose bytes are no text: no record could hold it."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise KdctlError(
            f"the argument {word!a} is not UTF-8 text, which is all that presets and records can hold; rename "
            "what it names, or set LC_ALL=C.UTF-8 if it is text in another locale"
        ) from None


def end(error: BaseException) -> int:
    """Say how a command ends that raised an error, and return the exit code. Of several processes the first says it."""
    stopping.notice()
    stopped = stopping.received()
    if stopped is not None and not isinstance(error, KeyboardInterrupt):
        error = stopped.with_traceback(error.__traceback__)  # libraries turn an interrupt into errors of their own
    if isinstance(error, BrokenPipeError) and error.filename in STREAMS.values():
        return BROKEN_PIPE
    from kdctl.cli.explain import explain

    ending = explain(error)
    if not _says(error):
        return ending.code
    if Known.verbose:
        traceback.print_exception(error)
    if ending.code == BUG:
        from kdctl.cli.bug import bug_message

        ending = ending._replace(message=bug_message(error, Known.folder, Known.preset))
    _say(ending.message)
    return ending.code


def _say(message: str) -> None:
    """Show an error, also where what shows it nicely is missing or nobody can read it."""
    Known.said = True
    try:
        from kdctl.cli.console import fail
    except Exception:  # noqa: BLE001 - whatever is broken about rich, the message is not about that
        fail = _plain
    try:
        fail(message)
        sys.stderr.flush()
    except OSError:
        _discard(2)


def _last_words(stopped: stopping.Stopped | stopping.Preempted) -> None:
    """Say why the process ends, unless an error was said before."""
    if not Known.said:
        from kdctl.cli.explain import explain

        _say(explain(stopped).message)


def _plain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def _says(error: BaseException) -> bool:
    """Tell whether this one of several processes says how they end: the first to fail; of preempted ones, the main."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or not {"MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}:
        return True
    stopping.finish()  # the launcher's signal would cut the message off
    if isinstance(error, stopping.Preempted):
        return os.environ.get("RANK", "0") == "0"
    try:
        from kdctl.system.distributed import first_to_report

        return first_to_report()
    except (ImportError, OSError, ValueError, KdctlError):
        return True


class _Stream(io.FileIO):
    """A standard stream whose errors say which one it is. What cannot be told on stderr does not end the work."""

    def __init__(self, number: int):
        super().__init__(number, "wb", closefd=False)

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return super().write(data)
        except BrokenPipeError as error:
            Known.unread, error.filename = True, STREAMS[self.fileno()]
            raise
        except OSError as error:
            if self.fileno() == 2:
                return len(data)
            error.filename = STREAMS[self.fileno()]
            raise


def _open_streams() -> None:
    """Make stdout and stderr print what their encoding has not with replacements, and closed ones drop it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # else the next file that is opened would take what is printed
    sys.stdout, sys.stderr = _text(sys.stdout, 1), _text(sys.stderr, 2)
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends


def _text(stream: Any, number: int) -> Any:
    """Return a standard stream with replacements; one that a caller put in its place is left alone."""
    try:
        if stream is not None and stream.fileno() != number:
            return stream
    except OSError:
        return stream
    encoding, raw = getattr(stream, "encoding", None) or "utf-8", _Stream(number)
    lines = number == 2 or raw.isatty() or bool(getattr(stream, "write_through", False))
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "replace", line_buffering=lines)


def _flush(code: int) -> int:
    """Print what is left; where that is not possible, say so unless something else was said."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(1)
        code = code or end(error)
    try:
        sys.stderr.flush()
    except OSError:
        _discard(2)
    return code


def _discard(number: int) -> None:
    """Let what is still to be printed go nowhere, so that the interpreter does not stumble over it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
