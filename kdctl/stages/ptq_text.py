"""Every student on one text of the kind that students write: the PTQ student's completions of the held-out prompts.

On its own text each student is measured on other tokens, and a difference between two of them is mostly one between
texts. On this one they are paired token by token, as on the teacher's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from transformers import PreTrainedModel

from kdctl.eval import distribution
from kdctl.eval.distribution import Yardstick
from kdctl.model.folder import fingerprint
from kdctl.model.teacher import Teacher
from kdctl.rollout.store import RolloutStore
from kdctl.run.documents import PerDocument, as_table, lost_items, write_items
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import EvalResult
from kdctl.stages.context import Context
from kdctl.stages.yardstick import Measuring, ensure_measuring, ensure_student_written, student_plan

PTQ_WRITTEN = "ptq_written"
Loaders = Mapping[str, Callable[[], PreTrainedModel]]


class PtqText:
    """The PTQ student's completions, read by the teacher when a student first is."""

    def __init__(self, measuring: Measuring, store: RolloutStore):
        self.measuring, self.rollouts, self.fingerprint = measuring, store.read(), store.fingerprint()

    @cached_property
    def yardstick(self) -> Yardstick:
        """The completions with the teacher's states."""
        return self.measuring.yardstick_of(self.rollouts)

    def measure(self, load: Callable[[], PreTrainedModel], name: str) -> PerDocument:
        """Compare a student with the teacher, which has read the text before the student is loaded."""
        read = self.yardstick
        return self.measuring.measure(load(), name, read)


def measure_on_ptq_text(
    context: Context, teacher: Teacher, measuring: Measuring | None, students: Loaders, asked: Sequence[str]
) -> None:
    """Add to the results of the students asked for, where it is missing, what they are on the PTQ student's text.

    students: what loads each model of the run but the teacher. Nothing is done where ``eval.student_written`` is off or
    the run has no PTQ student. Processes divide the students.
    """
    made = context.ranks.on_main((context.paths.student / "quantize.json").exists)
    if not context.preset.eval.student_written or not made or not asked:
        return
    store = RolloutStore(context.paths.eval("ptq") / "rollouts")

    def write(main: Context) -> None:
        writer = fingerprint(main.paths.student)
        if not store.complete(student_plan(main, teacher, writer, "ptq").identity):
            with main.claimed("eval/ptq"):
                ensure_student_written(main, teacher, students["ptq"], writer, "ptq")

    context.on_main(write)
    lacking = [name for name in asked if not _measured(context, name, store.fingerprint())]
    if not lacking:
        return
    text = PtqText(measuring or ensure_measuring(context, teacher), store)
    for name in context.ranks.share(lacking):
        with (main := context.alone()).claimed(f"eval/{name}"):
            _add(main, text, name, students[name])


def _add(context: Context, text: PtqText, name: str, load: Callable[[], PreTrainedModel]) -> None:
    """Measure a student and write its results again, the table first; nothing where another process has done it."""
    if _measured(context, name, text.fingerprint):
        return
    found = _results(context, name)
    sums = text.measure(load, name)
    folder = context.paths.eval(name)
    written = write_items(folder, {PTQ_WRITTEN: as_table(sums, distribution.prompt_ids(text.rollouts))})
    more = {
        PTQ_WRITTEN: distribution.summarize(sums),
        "ptq_text": text.fingerprint,
        "samples": found.samples | written,
    }
    write_record(context.paths.results(name), found.model_copy(update=more))


def _measured(context: Context, name: str, text: str) -> bool:
    """Tell whether a student's results say, document by document, what it is on a text."""
    lost = lost_items(context.paths.eval(name), [f"{PTQ_WRITTEN}.parquet"])
    return _results(context, name).ptq_text == text and not lost


def _results(context: Context, name: str) -> EvalResult:
    return read_record(context.paths.results(name), EvalResult)
