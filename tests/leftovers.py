"""What a killed process leaves on disk."""

import os
import subprocess
import sys
from pathlib import Path

from kdctl.run.files import temporary_name


def left_by(pid: int, path: Path, kind: str = "tmp") -> Path:
    """Name what another process of this host would have left beside a path."""
    name = temporary_name(path, kind).name.replace(f"-{os.getpid()}.", f"-{pid}.")
    return path.with_name(name)


def dead_process() -> int:
    """Return the id of a process that has ended."""
    command = [sys.executable, "-c", "import os; print(os.getpid())"]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)
