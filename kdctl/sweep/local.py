"""Runs trials on this machine: each is a distill variant and its eval in one run folder.

Everything that trials share is made once, by whichever process comes first; the others wait for it. A finished variant
is skipped and a killed one goes on from its checkpoint, because that is what the stages do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from kdctl.base.errors import DataError, TrainingError
from kdctl.base.progress import Reporter
from kdctl.run.measures import TOKEN_MEASURES, TokenMeasure
from kdctl.run.records import DistillReport, EvalResult, TaskScore
from kdctl.run.tracking import Watch
from kdctl.stages import pipeline
from kdctl.stages.context import Context, open_run
from kdctl.stages.yardstick import Measuring
from kdctl.sweep.board import Board
from kdctl.sweep.journal import Values
from kdctl.sweep.locks import only_sweep
from kdctl.sweep.plan import Shard, describe


class FellBehind(Exception):
    """A trial is stopped by ``early_terminate``."""


class LocalSweep:
    """A sweep in a run folder that is opened.

    One teacher and one yardstick serve all trials, which differ in distill and rollout settings only.
    """

    def __init__(self, board: Board, reporter: Reporter):
        self.board, self.plan, self.reporter = board, board.plan, reporter
        self.context, self.teacher = open_run(self.plan.preset, board.run.path, reporter=reporter)
        self.measuring: Measuring | None = None
        if self.plan.evaluate:
            self._check_tasks()
        self.journal = board.journal()
        self.base = board.base()

    def _check_tasks(self) -> None:
        """Load the tasks of a new folder, and those that trials are ranked by. Raises DataError for another metric."""
        _, *task, metric = self.plan.sweep.metric.name.split("/")
        if not task and self.board.run.eval_root.exists():
            return
        from kdctl.eval.tasks import build_tasks, metrics_of  # lm-eval takes seconds to import

        tasks = build_tasks(self.plan.preset.eval, self.teacher.offline)
        offered = {name: metrics_of(one) for name, one in tasks.items()}
        if task and metric not in offered.get(task[0], ()):
            raise _no_metric(self.plan.sweep.metric.name, offered)

    def run_slot(self, slot: int) -> None:
        """Do one slot's trial, or find that it is done. One that cannot be trained does not end the sweep."""
        trial = self.journal.begin(slot, self.plan.values(slot))
        values = self.journal.values(trial)
        if self.journal.stopped(trial):
            self.reporter.note(f"trial {describe(values)} was stopped by early_terminate, skipped")
            return
        metric, settings = self.plan.sweep.metric.name, self.plan.trial_preset(values).distill

        def watch(step: int, logged: dict[str, float]) -> None:
            if metric not in logged or step == settings.steps:  # the last step saves nothing any more
                return
            if self.journal.falls_behind(trial, step // settings.heldout_every, logged[metric]):
                raise FellBehind(f"stopped by early_terminate at step {step}")

        try:
            self.journal.finish(trial, self.run_trial(values, watch))
        except FellBehind as error:
            self.journal.stop(trial)
            self.reporter.note(f"trial {describe(values)} {error}")
        except (TrainingError, torch.OutOfMemoryError) as error:
            self.journal.fail(trial)
            self.reporter.note(f"trial {describe(values)} failed: {error}")

    def run_trial(self, values: Values, watch: Watch | None = None) -> float:
        """Train and evaluate one variant and return the sweep's metric."""
        context = replace(self.context, preset=self.plan.trial_preset(values))
        name, teacher = self.plan.variant(values, self.base), self.teacher
        measuring = self._measuring(context)
        report = pipeline.distill(context, teacher, measuring, name=name, watch=watch)
        scored = pipeline.evaluate(context, teacher, measuring, names=[name]) if self.plan.evaluate else {}
        return metric_value(self.plan.sweep.metric.name, report, scored.get(name))

    def _measuring(self, context: Context) -> Measuring:
        """Make the student and the yardstick where they are missing; the yardstick is read once for all trials."""
        pipeline.ensure_student(context, self.teacher)
        self.measuring = self.measuring or pipeline.ensure_measuring(context, self.teacher)
        return self.measuring

    def evaluate_references(self) -> None:
        """Score teacher and PTQ student, which every row of the report is compared with."""
        pipeline.evaluate(self.context, self.teacher, self.measuring, names=["teacher", "ptq"])


def run_shard(board: Board, shard: Shard, reporter: Reporter) -> None:
    """Run a shard's trials in order; Shard() is the whole sweep. Raises StoreError if another one runs there."""
    board.run.prepare()
    with only_sweep(board.locks, board.plan.sweep.name, shard.name, reporter.note):
        sweep = LocalSweep(board, reporter)
        for slot in shard.slots(board.plan.total):
            if sweep.journal.reached():
                reporter.note(f"metric.target={board.plan.sweep.metric.target:g} is reached, no further trial starts")
                break
            sweep.run_slot(slot)
        if board.plan.evaluate:
            sweep.evaluate_references()


def metric_value(name: str, report: DistillReport, result: EvalResult | None) -> float:
    """Return ``eval/forward_kl`` and its like from a variant's report, ``eval/<task>/<metric>`` from its evaluation."""
    _, *task, metric = name.split("/")
    if not task:
        return _of_variant(name, report, TOKEN_MEASURES[metric])
    scores: dict[str, TaskScore] = result.tasks if result else {}
    found = scores.get(task[0])
    if found is None or metric not in found.metrics:
        raise _no_metric(name, {key: score.metrics for key, score in scores.items()})
    return found.metrics[metric]


def _no_metric(name: str, offered: Mapping[str, Iterable[str]]) -> DataError:
    found = [f"eval/{task}/{metric}" for task, metrics in offered.items() for metric in metrics]
    return DataError(f"the evaluation has no {name}, which trials are ranked by; it has {', '.join(found)}")


def _of_variant(name: str, report: DistillReport, measure: TokenMeasure) -> float:
    found = report.after.estimate(measure)
    if found is None:
        raise DataError(
            f"variant {report.variant!r} was finished before {name} was measured and cannot be ranked by it; train it "
            "again with kdctl distill --force, or sweep in another folder"
        )
    return found.value
