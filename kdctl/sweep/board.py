"""Where a sweep stands, read from its run folder, whoever is working on it (no torch)."""

from pathlib import Path
from statistics import median
from typing import Literal

from optuna.trial import FrozenTrial, TrialState

from kdctl.config.preset import Preset
from kdctl.run.paths import RunDir, read_record
from kdctl.run.records import SweepReport, TrialRecord
from kdctl.run.tracking import read_metrics
from kdctl.sweep.journal import Journal
from kdctl.sweep.plan import SweepPlan

Status = Literal["waiting", "running", "complete", "stopped", "failed"]
STATUS: dict[TrialState, Status] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


class Board:
    """Reads one sweep's state in one run folder."""

    def __init__(self, plan: SweepPlan, folder: Path):
        self.plan, self.run = plan, RunDir(folder)

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
            step, left = self._pace(variant, steps)
            update = {"step": step, "left_s": left if trial.state == TrialState.RUNNING else None}
        return row.model_copy(update={"status": STATUS[trial.state], **update})

    def _pace(self, variant: str, steps: int) -> tuple[int, float | None]:
        """Return the steps done by an unfinished variant and the seconds that the others will take."""
        lines = read_metrics(self.run.variant(variant).metrics)
        if not lines:
            return 0, None
        done = int(lines[-1]["step"])
        return done, (steps - done) * median(line["time/step_s"] for line in lines)


def preview(plan: SweepPlan) -> list[TrialRecord]:
    """Describe the trials before the first, as far as they are known."""
    rows = []
    for slot in range(plan.total):
        values = plan.values(slot)
        name = plan.variant(values, plan.preset) if values is not None else None
        rows.append(TrialRecord(number=slot, values=values or {}, status="waiting", variant=name))
    return rows
