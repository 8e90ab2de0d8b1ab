"""Where a sweep stands, read from its run folder, whoever is working on it (no torch)."""

import os
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Literal

from optuna.trial import FrozenTrial, TrialState

from kdctl.config.preset import Preset
from kdctl.run.paths import RunDir
from kdctl.run.record_files import read_record
from kdctl.run.tracking import metric_line
from kdctl.sweep.journal import Journal
from kdctl.sweep.plan import SweepPlan
from kdctl.sweep.records import SweepReport, TrialRecord

Status = Literal["waiting", "running", "complete", "stopped", "failed"]
STATUS: dict[TrialState, Status] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


class Follower:
    """Follows an unfinished variant through its metrics.jsonl; each look reads what was added since the last."""

    def __init__(self) -> None:
        self.done, self._file, self._read = 0, 0, 0
        self._seconds: list[float] = []

    def look(self, path: Path) -> None:
        """Read new lines; a file written anew, as a resumed training does, is read from its start."""
        try:
            file = open(path, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._read:
                self.done, self._seconds, self._file, self._read = 0, [], found.st_ino, 0
            file.seek(self._read)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]  # a last line may be half written
        self._read += len(added)
        for text in filter(None, added.split(b"\n")):
            line = metric_line(path, len(self._seconds) + 1, text)
            self.done = int(line["step"])
            self._seconds.append(line.get("time/step_s", 0.0))

    def left(self, steps: int) -> float | None:
        """Return the seconds that the other steps will take."""
        return (steps - self.done) * median(self._seconds) if self._seconds else None


class Board:
    """Reads one sweep's state in one run folder."""

    def __init__(self, plan: SweepPlan, folder: Path):
        self.plan, self.run = plan, RunDir(folder)
        self._followers: defaultdict[str, Follower] = defaultdict(Follower)

    @property
    def folder(self) -> Path:
        """Return the sweep's own folder."""
        return self.run.sweeps / self.plan.sweep.name

    @property
    def locks(self) -> Path:
        """Return the folder of the locks."""
        return self.run.sweeps / "locks"

    def journal(self) -> Journal:
        """Open the sweep's state, made where it is missing."""
        return Journal(self.folder / "journal.log", self.plan.identity, self.plan.sweep)

    def base(self) -> Preset:
        """Return the preset that the folder belongs to."""
        return read_record(self.run.preset, Preset) if self.run.preset.exists() else self.plan.preset

    def report(self, journal: Journal) -> SweepReport:
        """Describe every trial and find the best."""
        trials, base = journal.trials(), self.base()
        rows = tuple(self._row(journal, slot, trials.get(slot), base) for slot in range(self.plan.total))
        metric = self.plan.sweep.metric
        scored = [row for row in rows if row.metric is not None]
        best = min(scored, key=lambda row: metric.sign * (row.metric or 0.0), default=None)
        return SweepReport(
            sweep=self.plan.sweep.name,
            folder=str(self.run.path),
            metric=metric.name,
            goal=metric.goal,
            trials=rows,
            best=best.variant if best else None,
        )

    def _row(self, journal: Journal, slot: int, trial: FrozenTrial | None, base: Preset) -> TrialRecord:
        """Describe one trial."""
        values = journal.values(trial) if trial else self.plan.values(slot)
        if values is None:
            return TrialRecord(number=slot, values={}, status="waiting")
        variant, steps = self.plan.variant(values, base), self.plan.trial_preset(values).distill.steps
        row = TrialRecord(number=slot, values=values, status="waiting", variant=variant, steps=steps)
        if trial is None:
            return row
        if trial.state == TrialState.COMPLETE:
            taken = trial.duration.total_seconds() if trial.duration else None
            update = {"metric": trial.value, "step": steps, "seconds_s": taken}
        else:
            found = self._followers[variant]
            found.look(self.run.variant(variant).metrics)
            update = {"step": found.done, "left_s": found.left(steps) if trial.state == TrialState.RUNNING else None}
        return row.model_copy(update={"status": STATUS[trial.state], **update})


def preview(plan: SweepPlan) -> list[TrialRecord]:
    """Describe the trials before the first, as far as they are known."""
    rows = []
    for slot in range(plan.total):
        values = plan.values(slot)
        name = plan.variant(values, plan.preset) if values is not None else None
        rows.append(TrialRecord(number=slot, values=values or {}, status="waiting", variant=name))
    return rows
