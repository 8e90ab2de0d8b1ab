"""The command that a preset names to give servers new weights."""

import shlex
import subprocess
from pathlib import Path

from kdctl.base.errors import ServerError
from kdctl.base.progress import Reporter


def filled(command: str, weights: Path, port: int | None = None) -> list[str]:
    """Return a command's words with the places in it filled."""
    words = shlex.split(command)
    return [word.replace("{weights}", str(weights)).replace("{port}", str(port)) for word in words]


def run_command(command: str, weights: Path, reporter: Reporter) -> None:
    """Run a command to its end. Raises ServerError if it fails or is not there."""
    words = filled(command, weights)
    with reporter.task("rollout.restart loads new weights"):
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ServerError(f"rollout.restart cannot be run: {error}; correct the command") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise ServerError(
            f"rollout.restart ended with {done.returncode} ({said or 'it said nothing'}): {shlex.join(words)}"
        )
