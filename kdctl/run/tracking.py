"""Where metrics go: always metrics.jsonl, and wandb when asked (the only file that imports it)."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdctl.base.errors import StoreError
from kdctl.base.rng import digest
from kdctl.config.preset import TrackingSection
from kdctl.run.files import append, read_bytes, write_text
from kdctl.run.record_files import damaged

if TYPE_CHECKING:
    import wandb

DOCUMENT = "document/"
"""Begins the names of numbers that one held-out document has: for later steps to compare with, no curves."""
Watch = Callable[[int, dict[str, float]], None]


class Tracker:
    """Writes one JSON line a call, and the same numbers to wandb when there is a run.

    On resume, lines after ``resume_step`` are dropped first: those steps are about to be done again. ``kept`` are the
    others.
    watch: told of each step after it is recorded; what it raises ends the training.
    """

    def __init__(self, path: Path, resume_step: int, run: "wandb.Run | None" = None, watch: Watch | None = None):
        self.kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if resume_step else []
        text = "".join(json.dumps(line) + "\n" for line in self.kept)
        write_text(path, text)
        self._hash = hashlib.sha256(text.encode())
        self._path, self._run, self._watch = path, run, watch

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record namespaced numbers of one step; they are on disk before a checkpoint of that step can be."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        append(self._path, line)
        self._hash.update(line)
        if self._run is not None:
            self._run.log({name: value for name, value in values.items() if not name.startswith(DOCUMENT)}, step=step)
        if self._watch is not None:
            self._watch(step, values)

    def sha256(self) -> str | None:
        """Return the hash of the file as it is now."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Finish the wandb run."""
        if self._run is not None:
            self._run.finish()


class Untracked(Tracker):
    """Writes nothing, in the processes beside the main one."""

    def __init__(self) -> None:
        self.kept = []

    def log(self, step: int, values: dict[str, float]) -> None:
        """Drop the numbers of a step."""

    def sha256(self) -> str | None:
        """Know no file."""
        return None

    def close(self) -> None:
        """Have nothing to close."""


def read_metrics(path: Path, expected: str | None = None) -> list[dict[str, float]]:
    """Read metrics.jsonl; a last line cut off by a kill is left out.

    expected: the file's sha256, where it is known. Raises StoreError if the file is another or cannot be read.
    """
    if not path.exists() and expected is None:
        return []
    data = read_bytes(path) if path.exists() else b""
    if expected not in (None, hashlib.sha256(data).hexdigest()):
        raise damaged(path, "it is not the file that the training wrote")
    return [metric_line(path, number, line) for number, line in enumerate(data.split(b"\n")[:-1], 1) if line]


def metric_line(path: Path, number: int, text: bytes) -> dict[str, float]:
    """Read one line of metrics.jsonl. Raises StoreError if it is damaged."""
    try:
        found = json.loads(text)
        return {**found, "step": int(found["step"])}
    except (ValueError, LookupError, TypeError) as error:
        raise damaged(path, f"line {number}: {error}") from None


def log_tables(settings: TrackingSection, folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Send tables, rows of equal keys by name, to a wandb run of their own; nothing where wandb is off."""
    run = open_wandb(settings, folder, "report", {})
    if run is None:
        return
    import wandb

    for name, rows in tables.items():
        columns: list[Any] = list(rows[0]) if rows else []
        data: list[Any] = [list(row.values()) for row in rows]
        run.log({f"report/{name}": wandb.Table(columns=columns, data=data, allow_mixed_types=True)})
    run.finish()


def open_wandb(settings: TrackingSection, folder: Path, name: str, config: dict[str, Any]) -> "wandb.Run | None":
    """Start a wandb run in ``folder``, resumed if it exists; None when wandb is off.

    The run's id holds the folder too, because two run folders may have variants of the same name.
    """
    if settings.wandb == "off":
        return None
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # else tables are put together in the home folder
    import wandb

    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=name,
        id=f"{name}-{digest(str(folder.resolve())):016x}",
        config=config,
        mode=settings.wandb,
        dir=str(folder),
        resume="allow" if settings.wandb == "online" else None,
        settings=wandb.Settings(silent=True),
    )


def create_sweep(config: dict[str, Any], settings: TrackingSection) -> str:
    """Create a sweep on wandb's server and return what an agent is told: ``entity/project/id``.

    The one place where a sweep talks to the server; agents are wandb's own program. What wandb says goes to stderr.
    Raises StoreError if wandb cannot: nobody is logged in, the server does not answer, or it refuses the sweep.
    """
    import wandb

    project, entity = config.get("project", settings.project), config.get("entity", settings.entity)
    try:
        with redirect_stdout(sys.stderr):
            sweep_id = wandb.sweep(config, project=project, entity=entity)
    except wandb.Error as error:
        raise StoreError(
            f"wandb cannot create the sweep, nothing runs: {error} Without --backend wandb, or after wandb login, the "
            "same sweep can run"
        ) from None
    return "/".join(part for part in (entity, project, sweep_id) if part)
