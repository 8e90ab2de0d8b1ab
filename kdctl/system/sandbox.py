"""Python programs that nobody has read, in a child that can do no more than compute."""

import os
import secrets
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from kdctl.base.errors import DataError
from kdctl.system import confined

SECONDS = 10
BYTES = 1 << 30
SCRIPT = Path(confined.__file__)
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
"""Where a system keeps what Python's own libraries are linked to."""


def ends_well(program: str, seconds: int = SECONDS, most_bytes: int = BYTES) -> bool:
    """Tell whether a program runs to its end, in so many seconds and bytes of memory, without an error.

    A program that exits by itself has not run to its end; one that sets out to look as if it had can do so. Raises
    DataError where this system cannot confine it.
    """
    word = secrets.token_hex(16)
    expected = (confined.READY + word).encode()
    with tempfile.TemporaryDirectory(prefix="kdctl-") as root, tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT), str(seconds), str(most_bytes), root, *_kept()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={"LC_ALL": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
        try:
            said = _said(child, f"{word}\n{program}".encode(errors="replace"), len(expected) + 1, seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        complaints.seek(0)
        why = complaints.read(1000).decode(errors="replace").strip()
    if not said.startswith(confined.READY.encode()):
        raise DataError(
            f"this system cannot confine a process ({why or 'it did not start in time'}), so code that a model writes "
            "is not run; use Linux 5.12 or later that allows user namespaces, or take the task out of eval.tasks"
        )
    return said == expected


def check() -> None:
    """Raise DataError where this system cannot confine a program, or not one that does nothing."""
    if not ends_well(""):
        raise DataError(
            "this system confines a process, but one that does nothing does not end well in it, so code that a model "
            "writes cannot be judged; raise the limits of this session (ulimit -a), or take the task out of eval.tasks"
        )


def _kept() -> list[str]:
    """List the folders that a program may read: Python's own, and those of the libraries that it needs."""
    own = (sysconfig.get_path("stdlib"), f"{sys.base_prefix}/lib")
    found = [*map(os.path.realpath, own), *(folder for folder in LIBRARIES if os.path.isdir(folder))]
    return sorted(one for one in {*found} if not any(one.startswith(f"{other}/") for other in found))


def _said(child: subprocess.Popen[bytes], given: bytes, most: int, seconds: float) -> bytes:
    """Give a child its input and return the first bytes that it says, as far as it says them in time."""
    stdin, stdout = child.stdin, child.stdout
    if stdin is None or stdout is None:
        return b""
    with suppress(BrokenPipeError), stdin:
        stdin.write(given)
    said, end = b"", time.monotonic() + seconds
    with stdout:
        while len(said) < most and select.select([stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            part = os.read(stdout.fileno(), most - len(said))
            if not part:
                break
            said += part
    return said
