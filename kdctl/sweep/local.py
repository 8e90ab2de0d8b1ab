"""Runs trials on this machine: each is a distill variant and its eval in one run folder (layer 4).

Everything that trials share is made once, by whichever process comes first; the others wait for it. A finished variant
is skipped and a killed one goes on from its checkpoint, because that is what the stages do.
"""

import copy

import torch

from kdctl import pipeline
from kdctl.errors import DataError, TrainingError
from kdctl.job import Job, open_job
from kdctl.preset import Preset
from kdctl.progress import Reporter
from kdctl.records import DistillReport, EvalResult, TaskScore
from kdctl.sweep.board import Board
from kdctl.sweep.locks import only_sweep, waiting
from kdctl.sweep.plan import Shard, describe
from kdctl.sweep.study import Values


class LocalSweep:
    """A sweep in a run folder that is opened, with what its trials share held in memory."""

    def __init__(self, board: Board, reporter: Reporter):
        self.board, self.plan = board, board.plan
        self.stages = board.locks / "stages"
        with waiting(self.stages / "shared.lock"):
            self.job = open_job(self.plan.preset, board.run.path, reporter)
            if self.plan.evaluate and not board.run.eval_root.exists():
                from kdctl.evaluate import build_tasks  # lm-eval takes seconds to import

                build_tasks(self.job.preset.eval, self.job.offline)
            self.study = board.study()
        self.base = board.base()

    def run_slot(self, slot: int) -> None:
        """Do one trial of the study, or find that it is done. One that cannot be trained does not end the sweep."""
        trial = self.study.begin(slot, self.plan.values(slot))
        values = self.study.values(trial)
        try:
            self.study.finish(trial, self.run_trial(values))
        except (TrainingError, torch.OutOfMemoryError) as error:
            self.study.fail(trial)
            self.job.reporter.note(f"trial {describe(values)} failed: {error}")

    def run_trial(self, values: Values) -> float:
        """Train and evaluate one variant and return the sweep's metric."""
        job, name = with_preset(self.job, self.plan.trial_preset(values)), self.plan.variant(values, self.base)
        with waiting(self.stages / "shared.lock"):
            pipeline.shared_stages(job)
        with waiting(self.stages / f"{name}.lock"):
            report = pipeline.distill(job, name)
            result = pipeline.evaluate(job, [name])[name] if self.plan.evaluate else None
        return metric_value(self.plan.sweep.metric.name, report, result)

    def evaluate_references(self) -> None:
        """Score teacher and PTQ student, which every row of the report is compared with."""
        with waiting(self.stages / "shared.lock"):
            pipeline.evaluate(self.job, ["teacher", "ptq"])


def run_shard(board: Board, shard: Shard, reporter: Reporter) -> None:
    """Run a shard's trials in order; Shard() is the whole sweep. Raises StoreError if another one runs there."""
    board.run.prepare()
    with only_sweep(board.locks, board.plan.sweep.name, shard.name):
        sweep = LocalSweep(board, reporter)
        for slot in shard.slots(board.plan.total):
            sweep.run_slot(slot)
        if board.plan.evaluate:
            sweep.evaluate_references()


def with_preset(job: Job, preset: Preset) -> Job:
    """Return the same job for another preset that differs in distill and rollout only: what is loaded stays loaded."""
    changed = copy.copy(job)
    changed.preset = preset
    return changed


def metric_value(name: str, report: DistillReport, result: EvalResult | None) -> float:
    """Return ``eval/forward_kl`` and its like from a variant's report, ``eval/<task>/<metric>`` from its evaluation."""
    _, *task, metric = name.split("/")
    if not task:
        return report.after.model_dump()[metric]["value"]
    scores: dict[str, TaskScore] = result.tasks if result else {}
    found = scores.get(task[0])
    if found is None or metric not in found.metrics:
        offered = [f"eval/{key}/{each}" for key, score in scores.items() for each in score.metrics]
        raise DataError(f"the evaluation has no {name}; it has {', '.join(offered)}")
    return found.metrics[metric]
