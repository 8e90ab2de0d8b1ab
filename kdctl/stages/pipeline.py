"""The whole job on one page, stage after stage; the only place where stages meet.

A stage whose outputs are complete and whose identity (a hash of the preset sections it reads and of its inputs) matches
is skipped with one line. A stage makes what it lacks from an earlier one, saying so.
"""

import shutil

from kdctl.base.errors import DataError
from kdctl.config.preset import Source
from kdctl.config.resolve import variant_name
from kdctl.report.front import write_report
from kdctl.rollout.store import RolloutStore
from kdctl.run.records import StoreManifest
from kdctl.stages.context import Job
from kdctl.stages.distill import distill, shared_stages
from kdctl.stages.evaluate import evaluate, open_foreign
from kdctl.stages.quantize import compare, ensure_student, quantize
from kdctl.stages.rollout import examples, fill_source, needed_sources, teacher_states

__all__ = [
    "compare",
    "distill",
    "evaluate",
    "examples",
    "needed_sources",
    "open_foreign",
    "quantize",
    "report",
    "rollout",
    "run_all",
    "shared_stages",
    "teacher_states",
    "variant_name",
]


def rollout(job: Job, source: Source, force: bool = False) -> StoreManifest:
    """Fill one rollout store: student- or teacher-written completions, or those of a data set."""
    store = RolloutStore(job.run.rollouts(source))
    if force:
        job.on_main(lambda: shutil.rmtree(store.path, ignore_errors=True))
    if source == "student":
        ensure_student(job)
    if not fill_source(job, source, store):
        job.reporter.note(f"rollout: {store.path} is complete, skipped")
    teacher_states(job, [store])
    return store.manifest()


def run_all(job: Job) -> str:
    """Run the five stages in order, skipping complete ones. In a new folder the tasks are checked before the work."""
    job.processes.check_trainable(job.preset.distill)
    if not job.processes.on_main(job.run.eval_root.exists):
        from kdctl.eval.tasks import build_tasks

        job.processes.main_first(lambda: build_tasks(job.preset.eval, job.offline))
    quantize(job)
    for source in needed_sources(job.preset):
        rollout(job, source)
    distill(job)
    evaluate(job)
    return report(job)


def report(job: Job) -> str:
    """Write the report and return its main table, or why there is none: models were not evaluated alike."""

    def written() -> str:
        try:
            return write_report([job.run], tracking=job.preset.tracking)
        except DataError as error:
            return f"no report: {error}"

    return job.on_main(written)
