"""The whole job on one page, stage after stage; the only place where stages meet.

A stage whose outputs are complete and whose identity (a hash of the preset sections it reads and of its inputs) matches
is skipped with one line. A stage makes what it lacks from an earlier one, saying so.
"""

from kdctl.base.errors import DataError
from kdctl.config.preset import Source
from kdctl.model.teacher import Teacher
from kdctl.report.front import Excerpt, write_report
from kdctl.run.records import StoreManifest
from kdctl.stages.context import Context
from kdctl.stages.distill import distill, ensure_stores
from kdctl.stages.evaluate import evaluate, open_foreign
from kdctl.stages.quantize import compare, ensure_student, quantize
from kdctl.stages.rollout import (
    check_prompt_lengths,
    ensure_teacher_states,
    examples,
    fill_source,
    needed_sources,
    store_of,
)
from kdctl.stages.yardstick import Measuring, ensure_measuring

__all__ = [
    "Measuring",
    "compare",
    "distill",
    "ensure_measuring",
    "ensure_stores",
    "ensure_student",
    "ensure_teacher_states",
    "evaluate",
    "examples",
    "needed_sources",
    "open_foreign",
    "quantize",
    "report",
    "rollout",
    "run_all",
]


def rollout(
    context: Context, teacher: Teacher, source: Source, *, force: bool = False, named: bool = False
) -> StoreManifest:
    """Fill one rollout store: student- or teacher-written completions, or those of a data set.

    named: a server that the preset names holds what writes this source; else it holds the student.
    """
    store = store_of(context, source)
    if source == "student":
        ensure_student(context, teacher)
    if not fill_source(context, teacher, source, store, force=force, named=named):
        context.reporter.note(f"rollout: {store.path} is complete, skipped")
    ensure_teacher_states(context, teacher, [store])
    return store.manifest()


def run_all(context: Context, teacher: Teacher) -> Excerpt:
    """Run the five stages in order, skipping complete ones. Prompts, and tasks of a new folder, are checked first."""
    preset, ranks = context.preset, context.ranks
    ranks.check_trainable(preset.distill)
    preset.distill.check_rates()
    if not ranks.on_main(context.paths.eval_root.exists):
        from kdctl.eval.tasks import build_tasks

        ranks.main_first(lambda: build_tasks(preset.eval, teacher.offline))
    check_prompt_lengths(context, teacher)
    measuring = ensure_measuring(context, teacher)
    quantize(context, teacher, measuring)
    for source in needed_sources(preset):
        rollout(context, teacher, source)
    distill(context, teacher, measuring)
    evaluate(context, teacher, measuring)
    return report(context)


def report(context: Context) -> Excerpt:
    """Write the report and return its verdicts and main table, or why it has none: models were not evaluated alike."""

    def written(main: Context) -> Excerpt:
        try:
            return write_report([main.paths], tracking=main.preset.tracking, say=main.reporter.note)
        except DataError as error:
            return Excerpt((f"no report: {error}",))

    return context.on_main(written)
