"""Benchmarks and distances of every model of a run."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from kdctl.base.errors import DataError, ModelError, PresetError
from kdctl.config.preset import RolloutSection
from kdctl.config.resolve import identity
from kdctl.eval import distribution
from kdctl.eval.allocation import Allocation, allocate
from kdctl.formats.student import check_sums, load_student_model
from kdctl.model.external import Foreign, check_comparable, find_foreign, load_foreign
from kdctl.model.folder import fingerprint, weights_bytes
from kdctl.model.teacher import Teacher
from kdctl.rollout.engine import in_process, served
from kdctl.rollout.work import RolloutEngine, Work
from kdctl.run.documents import PerDocument, as_table, lost_items, write_items
from kdctl.run.files import remove, sha256
from kdctl.run.record_files import damaged, read_record, write_record
from kdctl.run.records import DistillReport, EvalResult, Prompt, Rollout, TaskScore
from kdctl.stages.context import Context, versions
from kdctl.stages.distill import check_name
from kdctl.stages.ptq_text import PTQ_WRITTEN, measure_on_ptq_text
from kdctl.stages.quantize import ensure_student
from kdctl.stages.served import FolderFiles
from kdctl.stages.yardstick import Measuring, ensure_heldout, ensure_measuring, ensure_student_written

Sums = tuple[PerDocument, Sequence[str]]
"""What was measured on each document, and the documents' prompts."""


@dataclass(frozen=True)
class Measured:
    """What is found of a model: scores of tasks and their items, its distances, and what it wrote to be read yet."""

    scores: dict[str, TaskScore]
    items: dict[str, pa.Table]
    distances: dict[str, Sums]
    own: Sequence[Rollout] | None = None


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate. foreign: where it came from, if kdctl did not make it here."""

    name: str
    folder: Path
    foreign: Foreign | None = None

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the weights, hashed once. Raises StoreError if a folder of this run lacks a file."""
        try:
            return fingerprint(self.folder)
        except (OSError, ModelError):
            if not self.foreign and self.name != "teacher":
                check_sums(self.folder)
            raise


def evaluate(
    context: Context,
    teacher: Teacher,
    measuring: Measuring | None = None,
    *,
    names: Sequence[str] = (),
    force: bool = False,
    also: Foreign | None = None,
) -> dict[str, EvalResult]:
    """Evaluate teacher, PTQ student and every variant, or only those named, and ``also`` a model made elsewhere.

    Tasks are loaded before any model. Processes divide the models.
    """
    known = _candidates(context, teacher, also)
    for name in names:
        if name not in known:
            raise DataError(f"no model {name!r} in {context.paths.path}; there are {', '.join(known)}")
    chosen = [one for one in known.values() if not names or one.name in names or one.foreign]
    pending = chosen if force else _pending(context, teacher, chosen)
    tasks = _tasks(context, teacher) if pending else {}
    for one in chosen:
        if one not in pending:
            context.reporter.note(f"eval: {one.name} is complete, skipped")
        elif not force and context.paths.results(one.name).exists():
            context.reporter.note(f"eval: {one.name} {_why_again(context, one)}")
    found = _evaluate_all(context, teacher, measuring, pending, tasks, force) if pending else measuring
    context.ranks.wait()
    students = {one.name: partial(_load, teacher, one) for one in known.values() if one.name != "teacher"}
    asked = [one.name for one in chosen if one.name != "teacher"]
    measure_on_ptq_text(context, teacher, found, students, asked)
    context.ranks.wait()
    return {one.name: read_record(context.paths.results(one.name), EvalResult) for one in chosen}


def _tasks(context: Context, teacher: Teacher) -> dict[str, Any]:
    """Load the tasks, and say which settings do nothing in them."""
    from kdctl.eval.tasks import build_tasks, generates  # lm-eval takes seconds to import; only this stage needs it

    settings = context.preset.eval
    tasks = context.ranks.main_first(lambda: build_tasks(settings, teacher.offline))
    if (settings.samples > 1 or settings.temperature is not None) and not generates(tasks):
        context.reporter.note("eval.samples and eval.temperature have no effect: none of the tasks has answers written")
    return tasks


def _evaluate_all(
    context: Context,
    teacher: Teacher,
    measuring: Measuring | None,
    pending: Sequence[Candidate],
    tasks: dict[str, Any],
    force: bool,
) -> Measuring:
    """Make what measuring needs and return it; then evaluate this process's share of the models."""
    if any(one.foreign is None and one.name != "teacher" for one in pending):
        ensure_student(context, teacher, measuring)
    found = measuring or ensure_measuring(context, teacher)
    if context.preset.eval.allocation == "margin":
        pending = _after_teacher(context, found, pending, tasks)
    for one in context.ranks.share(pending):
        with (main := context.alone()).claimed(f"eval/{one.name}"):
            if force or _pending(main, teacher, [one]):  # else another process did it meanwhile
                _evaluate_one(main, found, one, tasks)
    return found


def _after_teacher(
    context: Context, measuring: Measuring, pending: Sequence[Candidate], tasks: dict[str, Any]
) -> list[Candidate]:
    """Evaluate the teacher where its answers, which say what the others are asked, are missing; return the others."""
    one = Candidate("teacher", measuring.teacher.folder())

    def made(main: Context) -> None:
        with main.claimed("eval/teacher"):
            if one.name in (each.name for each in pending) or _pending(main, measuring.teacher, [one]):
                _evaluate_one(main, measuring, one, tasks)

    context.on_main(made)
    return [each for each in pending if each.name != one.name]


def _allocations(context: Context, one: Candidate, tasks: dict[str, Any]) -> dict[str, Allocation]:
    """Choose by the teacher's answers which documents of each task a student is asked."""
    settings = context.preset.eval
    if settings.allocation == "all" or one.name == "teacher":
        return {}
    scored = read_record(context.paths.results("teacher"), EvalResult)
    found = {}
    for name in tasks:
        path = context.paths.samples("teacher", name)
        if not path.exists() or sha256(path) != scored.samples.get(path.name):
            raise damaged(path, "it is not the file that the results were computed from")
        table = pq.read_table(path)
        if (allocation := allocate(table, scored.tasks[name].metric, settings)) is not None:
            found[name] = allocation
    return found


def open_foreign(context: Context, teacher: Teacher, name: str, reference: str) -> Foreign:
    """Find a model made elsewhere for a row of its own."""
    return find_foreign(check_name(name, "--as"), reference, teacher.dtype, teacher.offline)


def _candidates(context: Context, teacher: Teacher, also: Foreign | None) -> dict[str, Candidate]:
    """List what can be evaluated, by name, in the order of the report."""
    paths = context.paths
    variants = [Candidate(variant.name, variant.final) for variant in paths.variants()]
    found = [Candidate("teacher", teacher.folder()), Candidate("ptq", paths.student)]
    if also is not None:
        if also.name in {variant.name for variant in variants}:
            raise PresetError(f"--as {also.name!r} is the name of a variant in {paths.path}; choose another")
        check_comparable(also, teacher.tokenizer(), teacher.config())
        found.append(Candidate(also.name, also.folder, also))
    return {one.name: one for one in [*found, *variants]}


def _eval_identity(context: Context, teacher: Teacher, one: Candidate, heldout: str) -> str:
    """Hash what an evaluation reads. heldout: fingerprint of the yardstick's store."""
    inputs = {
        "weights": one.weights,
        "teacher": teacher.fingerprint(),
        "heldout": heldout,
        "lm_eval": version("lm-eval"),
    }
    settings = context.preset.eval
    if one.name == "teacher":
        settings = settings.model_copy(update={"allocation": "all"})  # it answers everything
    sections = {"eval": settings.decisive(), "text_tokens": context.preset.heldout.text_tokens}
    return identity("eval", sections, inputs)


def _pending(context: Context, teacher: Teacher, chosen: Sequence[Candidate]) -> list[Candidate]:
    """List the models without whole results of the same weights, tasks, limit and yardstick."""
    paths = [context.paths.results(one.name) for one in chosen]
    known = {path.parent.name: read_record(path, EvalResult) for path in paths if path.exists()}
    made = {name: found.identity for name, found in known.items() if not _lost(context.paths.eval(name), found)}
    if not made:
        return list(chosen)
    heldout = ensure_heldout(context, teacher).fingerprint()
    return [one for one in chosen if made.get(one.name) != _eval_identity(context, teacher, one, heldout)]


def _lost(folder: Path, found: EvalResult) -> list[str]:
    """List the tables of an evaluation that are not there any more, but for what can be measured by itself."""
    return lost_items(folder, found.samples.keys() - {f"{PTQ_WRITTEN}.parquet"})


def _why_again(context: Context, one: Candidate) -> str:
    """Say why a model that has results is evaluated again."""
    found = read_record(context.paths.results(one.name), EvalResult)
    if lost := _lost(context.paths.eval(one.name), found):
        return f"lacks {', '.join(sorted(lost))}; it is evaluated again"
    return "has results of other weights, tasks, settings or text; they are replaced"


def _evaluate_one(context: Context, measuring: Measuring, one: Candidate, tasks: dict[str, Any]) -> None:
    """Score one model on the tasks and the yardstick and write its results, items first."""
    started, folder, teacher = time.perf_counter(), context.paths.eval(one.name), measuring.teacher
    found = _measured(context, measuring, one, tasks)
    if found.own is not None:
        found.distances["student_written"] = _on_own_text(measuring, one, found.own)
    remove(context.paths.results(one.name))  # they are not of the items that are written now
    tables = {name: as_table(sums, prompts) for name, (sums, prompts) in found.distances.items()}
    written = write_items(folder, found.items | tables)
    summary = {name: distribution.summarize(sums) for name, (sums, _) in found.distances.items()}
    result = EvalResult(
        model=one.name,
        identity=_eval_identity(context, teacher, one, measuring.store.fingerprint()),
        weights=one.weights,
        limit=context.preset.eval.limit,
        tasks=found.scores,
        samples=written,
        distribution=summary["heldout"],
        student_written=summary.get("student_written"),
        text=distribution.text_metrics(found.distances["text"][0]),
        text_distribution=summary["text"],
        size_bytes=weights_bytes(one.folder),
        seconds_s=time.perf_counter() - started,
        versions=versions(),
        settings=_settings(context, one),
        reference=one.foreign.reference if one.foreign else None,
    )
    write_record(context.paths.results(one.name), result)


def _measured(context: Context, measuring: Measuring, one: Candidate, tasks: dict[str, Any]) -> Measured:
    """Do all of an evaluation that needs the model alone, once the teacher has read what it needs to read."""
    from kdctl.eval.tasks import generates, score_tasks

    teacher, text, settings = measuring.teacher, measuring.text_yardstick(), context.preset.eval
    stated = _stated(measuring, one)
    model = _load(teacher, one)
    with (
        _engine(context, measuring, one, model) if generates(tasks) else nullcontext() as engine,
        context.reporter.task(f"evaluating {one.name}", "documents") as advance,
    ):
        scores, items = score_tasks(
            model,
            teacher.tokenizer(),
            tasks,
            settings,
            lambda _, done, total: advance(done, total),
            engine,
            _allocations(context, one, tasks),
        )
    sums = measuring.measure(model, one.name) if stated is None else stated
    heldout = sums, distribution.prompt_ids(measuring.completions())
    found: dict[str, Sums] = {"heldout": heldout, "text": (distribution.compare(model, text), ())}
    if not settings.student_written:
        return Measured(scores, items, found)
    if one.name == "teacher":
        return Measured(scores, items, found | {"student_written": heldout})
    own = ensure_student_written(context, teacher, lambda: model, one.weights, one.name)
    return Measured(scores, items, found, own.read())


def _on_own_text(measuring: Measuring, one: Candidate, own: Sequence[Rollout]) -> Sums:
    """Compare a student with the teacher on the student's completions, which the teacher reads first."""
    read = measuring.yardstick_of(own)
    return measuring.measure(_load(measuring.teacher, one), one.name, read), distribution.prompt_ids(own)


@contextmanager
def _engine(context: Context, measuring: Measuring, one: Candidate, model: PreTrainedModel) -> Iterator[RolloutEngine]:
    """Make what writes the answers of a model to tasks that generate."""
    settings, stop = context.preset.eval, measuring.teacher.stop_ids()
    if settings.engine == "transformers":
        yield in_process(Work(model, stop, "student", RolloutSection(batch_size=settings.batch_size)))
        return
    scratch = context.paths.served / one.name
    work = Work(
        model,
        stop,
        "student",
        context.preset.rollout,
        [Prompt(each.prompt_id, each.prompt_index, each.prompt_ids) for each in measuring.completions()],
        FolderFiles(one.folder, scratch),
        one.weights[:16],
        context.reporter,
    )
    with closing(served(work)) as engine:
        engine.load(model, 0)
        yield engine
    remove(scratch)


def _settings(context: Context, one: Candidate) -> dict[str, Any]:
    """Return the settings that a variant was trained with; no other model has any."""
    report = context.paths.variant(one.name).report
    return read_record(report, DistillReport).settings if report.exists() and not one.foreign else {}


def _load(teacher: Teacher, one: Candidate) -> PreTrainedModel:
    """Load a model; the teacher is forgotten where it is not the one."""
    if one.name == "teacher":
        return teacher.load()
    teacher.forget()
    if one.foreign:
        return load_foreign(one.foreign, teacher.dtype, teacher.device)
    return load_student_model(one.folder, teacher.device)


def _stated(measuring: Measuring, one: Candidate) -> PerDocument | None:
    """Return what is known of a model on the yardstick; where that is nothing, have the teacher read it."""
    if one.name == "teacher":
        return distribution.compare_teacher(measuring.yardstick())
    written = None if one.foreign else measuring.measured(one.folder)
    if written is None:
        measuring.yardstick()
    return written
