"""The command that a preset names to give servers new weights."""

import shlex
import subprocess
import tempfile
from pathlib import Path

from kdctl.base.errors import ServerError
from kdctl.base.progress import Reporter

LONGEST_S = 900.0
"""Seconds that a command may take."""


def filled(command: str, weights: Path, port: int | None = None) -> list[str]:
    """Return a command's words with the places in it filled."""
    words = shlex.split(command)
    return [word.replace("{weights}", str(weights)).replace("{port}", str(port)) for word in words]


def run_command(command: str, weights: Path, reporter: Reporter) -> None:
    """Run a command to its end. Raises ServerError if it fails or is not there."""
    words = filled(command, weights)
    with reporter.task("rollout.restart loads new weights"), tempfile.TemporaryFile() as said:
        try:
            # What it leaves running may hold on to its output, and is not to be ended by Ctrl-C with kdctl.
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=LONGEST_S,
                start_new_session=True,
                check=False,
            )
        except OSError as error:
            raise ServerError(f"rollout.restart cannot be run: {error}; correct the command") from None
        except subprocess.TimeoutExpired:
            raise ServerError(f"rollout.restart did not end in {LONGEST_S:.0f} s: {shlex.join(words)}") from None
        said.seek(0)
        text = " ".join(said.read().decode("utf-8", "replace").split())[-300:]
    if done.returncode:
        raise ServerError(
            f"rollout.restart ended with {done.returncode} ({text or 'it said nothing'}): {shlex.join(words)}"
        )
