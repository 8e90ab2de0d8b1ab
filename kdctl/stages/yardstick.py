"""The yardstick of a run: held-out completions by the teacher and plain text, on which every student is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from kdctl.base.errors import DataError
from kdctl.base.progress import Reporter
from kdctl.config.resolve import identity
from kdctl.data.prompts import PromptReader, PromptSet
from kdctl.eval import distribution
from kdctl.eval.distribution import Yardstick
from kdctl.formats.student import read_heldout
from kdctl.model.context import check_completions
from kdctl.model.teacher import Teacher
from kdctl.rollout.fill import Plan, fill, usable
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.store import RolloutStore
from kdctl.run.documents import PerDocument, from_table
from kdctl.run.record_files import read_record
from kdctl.run.records import QuantizeReport, Rollout, TextMetrics
from kdctl.stages.context import Context

FEWEST = 2


def prompt_reader(context: Context, teacher: Teacher) -> PromptReader:
    """Return what reads prompts with the teacher's tokenizer."""
    return PromptReader(teacher.tokenizer(), context.preset.prompts, teacher.offline)


def heldout_prompts(context: Context, teacher: Teacher) -> PromptSet:
    """Read the held-out prompts.

    Raises PresetError if one with its completion exceeds the teacher's context, DataError if there is one only.
    """
    settings = context.preset.heldout
    found = prompt_reader(context, teacher).heldout(settings.num_prompts, settings.seed)
    check_completions(teacher.reach(), found.longest, settings.max_new_tokens, "heldout.max_new_tokens")
    if len(found.prompts) < FEWEST:
        raise DataError(
            f"the yardstick has {len(found.prompts)} held-out prompt, and intervals over documents need at least "
            f"{FEWEST}: of one alone each would have no width, as if it were certain. Raise heldout.num_prompts (now "
            f"{settings.num_prompts}), or name a source of more prompts in prompts.heldout"
        )
    return found


def heldout_plan(context: Context, teacher: Teacher, role: str, writer: str) -> Plan:
    """Say what a store of held-out completions holds. role: who writes them; writer: its fingerprint."""
    settings, prompts = context.preset.heldout, heldout_prompts(context, teacher)
    sections = {"heldout": settings.model_dump(exclude={"text_tokens", "min_completion_tokens"})}
    inputs = {role: writer, "prompts": prompts.fingerprint(), **teacher.new_stops()}
    name = identity("heldout", sections, inputs)
    source = "heldout" if role == "teacher" else role
    return Plan(source, name, writer, prompts, settings.prompts_per_block)


def write_heldout(context: Context, teacher: Teacher, store: RolloutStore, plan: Plan, model: PreTrainedModel) -> None:
    """Have a model complete the held-out prompts at temperature 1, with the same random numbers as any other."""
    settings = context.preset.heldout
    teacher.say_stops()
    sampling = Sampling(1.0, 1.0, 0, settings.max_new_tokens, 0, settings.seed)
    source = "teacher" if plan.source == "heldout" else plan.source
    # Never the engine of the preset: a yardstick must be the same however the training rollouts were written.
    engine = InProcess(model, teacher.stop_ids(), source, settings.prompts_per_block, say=context.reporter.note)
    fill(store, plan, engine, sampling, context.reporter, context.ranks)


def ensure_heldout(context: Context, teacher: Teacher) -> RolloutStore:
    """Return the teacher's held-out completions, written first where they are missing.

    Raises DataError if they have fewer tokens than ``heldout.min_completion_tokens``.
    """
    settings = context.preset.heldout
    store = RolloutStore(context.paths.heldout)
    plan = heldout_plan(context, teacher, "teacher", teacher.fingerprint())
    asked = {"heldout.max_new_tokens": settings.max_new_tokens, "heldout.seed": settings.seed}

    def there() -> bool:
        return context.ranks.on_main(lambda: usable(store, plan.identity, asked))

    if not there():
        with context.claimed("rollouts/heldout"):
            if not there():
                write_heldout(context, teacher, store, plan, teacher.load())
    tokens = store.manifest().completion_tokens
    if tokens < settings.min_completion_tokens:
        raise DataError(
            f"the yardstick has {tokens} completion tokens and heldout.min_completion_tokens is "
            f"{settings.min_completion_tokens}; with fewer every interval is too wide. Raise heldout.num_prompts "
            f"(now {settings.num_prompts}) and use another --run"
        )
    return store


def ensure_student_written(
    context: Context, teacher: Teacher, load: Callable[[], PreTrainedModel], writer: str, name: str
) -> RolloutStore:
    """Return held-out completions by a model itself, written first where its evaluation does not hold this model's.

    load: gives the model, where it has to write. name: what the run folder calls it. writer: its fingerprint.
    """
    store, plan = RolloutStore(context.paths.eval(name) / "rollouts"), student_plan(context, teacher, writer, name)
    if not store.complete(plan.identity):
        write_heldout(context, teacher, store, plan, load())
    return store


def student_plan(context: Context, teacher: Teacher, writer: str, name: str) -> Plan:
    """Say what a store of held-out completions by a student holds. writer: its fingerprint; name: the run folder's."""
    return replace(heldout_plan(context, teacher, "student", writer), whose=f"{name}'s")


@dataclass(frozen=True)
class Measuring:
    """Measures models against the teacher. What the teacher reads it reads once, when a measurement first needs it."""

    teacher: Teacher
    store: RolloutStore
    text_tokens: int
    reporter: Reporter

    @cached_property
    def identity(self) -> str:
        """Hash of everything that students are measured on."""
        store, teacher = self.store.fingerprint(), self.teacher.fingerprint()
        return distribution.yardstick_identity(self.text_tokens, store, teacher, self.text_window)

    @property
    def text_window(self) -> int:
        """Tokens of the longest document of plain text."""
        return distribution.text_window(self.teacher.reach())

    @cached_property
    def _completions(self) -> Sequence[Rollout]:
        return self.store.read()

    @cached_property
    def _read(self) -> Yardstick:
        return self.yardstick_of(self.completions())

    @cached_property
    def _text_read(self) -> Yardstick:
        return distribution.text_yardstick(self.teacher.load(), self.text())

    @cached_property
    def _teacher_text(self) -> TextMetrics:
        return distribution.text_perplexity(self.teacher.load(), self.text())

    def completions(self) -> Sequence[Rollout]:
        """Return the held-out completions; the files are compared with their hashes once."""
        return self._completions

    def read(self) -> None:
        """Have the teacher read now what a new student is measured on, so that it need not be in memory beside one."""
        self.yardstick()
        self.teacher_text()

    def yardstick(self, documents: int | None = None) -> Yardstick:
        """Return the held-out completions, or their first ``documents``, with the teacher's states."""
        return self._read if documents is None else self.yardstick_of(self.completions()[:documents])

    def yardstick_of(self, rollouts: Sequence[Rollout]) -> Yardstick:
        """Have the teacher read completions of held-out prompts."""
        with self.reporter.task("teacher reads held-out completions", "batches") as advance:
            return distribution.make_yardstick(self.teacher.load(), rollouts, advance)

    def text(self) -> list[list[int]]:
        """Return the plain text for perplexity, as documents of tokens."""
        return distribution.text_documents(self.teacher.tokenizer(), self.text_tokens, self.text_window)

    def text_yardstick(self) -> Yardstick:
        """Return the plain text with the teacher's states."""
        return self._text_read

    def teacher_text(self) -> TextMetrics:
        """Return the teacher's perplexity on plain text."""
        return self._teacher_text

    def measured(self, folder: Path) -> PerDocument | None:
        """Read what a student folder says of itself, if every measure was taken on this yardstick."""
        if read_record(folder / "quantize.json", QuantizeReport).yardstick != self.identity:
            return None
        found = from_table(read_heldout(folder))
        return found if found.complete else None

    def measure(self, model: PreTrainedModel, label: str, yardstick: Yardstick | None = None) -> PerDocument:
        """Compare a model with the teacher on the yardstick, or on other completions that the teacher has read."""
        yardstick = yardstick or self.yardstick()
        with self.reporter.task(f"{label} reads held-out completions", "batches") as advance:
            return distribution.compare(model, yardstick, advance)


@dataclass(frozen=True)
class Figures:
    """What is measured of a student: on the yardstick by document, and on plain text beside the teacher."""

    per_document: PerDocument
    text: TextMetrics
    teacher_text: TextMetrics


def figures_of(measuring: Measuring, model: PreTrainedModel, label: str) -> Figures:
    """Measure a student."""
    per_document = measuring.measure(model, label)
    text = distribution.text_perplexity(model, measuring.text())
    return Figures(per_document, text, measuring.teacher_text())


def ensure_measuring(context: Context, teacher: Teacher) -> Measuring:
    """Return what measures models of a run, its held-out completions written first where they are missing."""
    store = ensure_heldout(context, teacher)
    return Measuring(teacher, store, context.preset.heldout.text_tokens, context.reporter)
