"""Python programs that nobody has read, in a child that can do no more than compute."""

import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from kdctl.base.errors import DataError
from kdctl.system import confined

SECONDS = 10
BYTES = 1 << 30
SCRIPT = Path(confined.__file__)


def ends_well(program: str, seconds: int = SECONDS, most_bytes: int = BYTES) -> bool:
    """Tell whether a program runs to its end, in so many seconds and bytes of memory, without an error.

    A program that exits by itself has not run to its end. Raises DataError where this system cannot confine it.
    """
    word = secrets.token_hex(16)
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SCRIPT), word, str(seconds), str(most_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"LC_ALL": "C.UTF-8"},
        cwd="/",
        start_new_session=True,
    )
    try:
        said, complaint = child.communicate(program.encode(errors="replace"), timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    if child.returncode == confined.REFUSED:
        raise DataError(
            f"this system lets no process give up network and files ({complaint.decode(errors='replace').strip()}), so "
            "code that a model writes cannot be confined and is not run; use Linux 5.12 or later that allows user "
            "namespaces, or take the task out of eval.tasks"
        )
    return said == word.encode()


def check() -> None:
    """Raise DataError where this system cannot confine a program."""
    ends_well("")
