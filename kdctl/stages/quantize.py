"""The first stage: the PTQ student, and post-training methods side by side."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdctl.base.errors import StoreError
from kdctl.base.progress import Advance
from kdctl.config.preset import QuantizeSection
from kdctl.config.resolve import identity
from kdctl.eval import distribution as metrics
from kdctl.eval.distribution import PerDocument
from kdctl.formats.student import Student, check_sums
from kdctl.model.batch import Batch, collate, split
from kdctl.model.folder import weights_bytes
from kdctl.quant.apply import Weights, build_student, layer_errors, quantize_calibrated, quantize_layers, sqnr
from kdctl.quant.autoround import Task, autoround, check_installed
from kdctl.rollout.store import RolloutStore
from kdctl.run.paths import read_record, write_record
from kdctl.run.records import MethodResult, QuantizeReport
from kdctl.stages.context import Job, versions
from kdctl.stages.publish import accept_student, write_student
from kdctl.stages.rollout import filled

CALIBRATION_BATCH = 16


@dataclass(frozen=True)
class Recipe:
    """What decides a PTQ student. calibration: the store that a method with calibration data reads."""

    settings: QuantizeSection
    identity: str
    calibration: RolloutStore | None


def quantize(job: Job, force: bool = False) -> QuantizeReport:
    """Make ``student/`` from the teacher by post-training quantization."""
    report = job.run.student / "quantize.json"
    recipe = recipe_of(job, job.preset.quantize)
    if force or not job.processes.on_main(report.exists):
        _ = job.heldout_store
    return job.on_main(lambda: _quantize(job, recipe, report, force))


def _quantize(job: Job, recipe: Recipe, report: Path, force: bool) -> QuantizeReport:
    """Make and measure the student, or read what is said of the one that is there."""
    if report.exists() and not force:
        found = read_record(report, QuantizeReport)
        if found.identity == recipe.identity:
            check_sums(job.run.student)
            job.reporter.note(f"quantize: {job.run.student} is complete, skipped")
            return found
        raise StoreError(f"{job.run.student} was made from another teacher or with other settings; use another --run")
    _write_new(job, recipe)
    accept_student(job, job.run.student)
    return read_record(report, QuantizeReport)


def _write_new(job: Job, recipe: Recipe) -> None:
    """Make the student, measure it and write it beside its place. It ends with this call: the gate needs its room."""
    student, seconds = make_student(job, recipe)
    per_document = job.measure(student.model, "student")
    described = describe_student(job, student, recipe.identity, per_document, seconds)
    write_student(job, job.run.student, student, described, per_document)


def compare(job: Job, sections: Sequence[QuantizeSection], force: bool = False) -> list[MethodResult]:
    """Quantize and measure the teacher in several ways. Keeps their figures, not their students."""
    if any(settings.method == "autoround" for settings in sections):
        check_installed()
    return job.on_main(lambda: [_compared(job, recipe_of(job, settings), force) for settings in sections])


def _compared(job: Job, recipe: Recipe, force: bool) -> MethodResult:
    """Quantize with one method and measure, or read what was measured before."""
    settings, path = recipe.settings, job.run.compared(recipe.settings.method)
    if path.exists() and not force:
        found = read_record(path, MethodResult)
        if (found.identity, found.yardstick) == (recipe.identity, job.yardstick_identity):
            job.reporter.note(f"compare: {path} is complete, skipped")
            return found
    student, seconds = make_student(job, recipe)
    result = MethodResult(
        identity=recipe.identity,
        seconds_s=seconds,
        sqnr_db=sqnr(job.teacher, student.weights),
        yardstick=job.yardstick_identity,
        distribution=metrics.summarize(job.measure(student.model, settings.method)),
        text=metrics.text_perplexity(student.model, job.text),
        versions=versions(),
        **grid_record(settings),
    )
    write_record(path, result)
    return result


def recipe_of(job: Job, settings: QuantizeSection) -> Recipe:
    """Put together what decides a PTQ student, filling the calibration store where it is missing."""
    calibration = filled(job, settings.calibration_source) if settings.calibrated else None
    inputs = {"teacher": job.fingerprint} | ({"calibration": calibration.fingerprint()} if calibration else {})
    name = identity("quantize", {"quantize": settings, "dtype": str(job.dtype)}, inputs)
    return Recipe(settings, name, calibration)


def make_student(job: Job, recipe: Recipe) -> tuple[Student, float]:
    """Quantize the teacher; also return how long it took, in seconds."""
    started, settings = time.perf_counter(), recipe.settings
    with job.reporter.task(f"quantizing {len(job.layers)} layers with {settings.method}", "layers") as advance:
        weights = _quantized(job, recipe, advance)
    seconds = time.perf_counter() - started
    return Student(build_student(job.teacher, weights), weights), seconds


def _quantized(job: Job, recipe: Recipe, advance: Advance) -> Weights:
    """Run a method, on calibration sequences where it takes them."""
    settings = recipe.settings
    if recipe.calibration is None:
        return quantize_layers(job.teacher, job.layers, settings, advance)
    batches = calibration_batches(job, recipe.calibration)
    if settings.method == "gptq":
        return quantize_calibrated(job.teacher, job.layers, settings, batches, advance)
    task = Task(
        teacher=job.folder,
        dtype=job.preset.teacher.dtype,
        device=str(job.device),
        settings=settings,
        names=tuple(job.layers),
        seed=job.preset.rollout.seed,
    )
    return autoround(task, batches, advance)


def calibration_batches(job: Job, store: RolloutStore) -> list[Batch]:
    """Cut the first sequences of a store into batches, prompts and completions together."""
    rollouts = store.read()[: job.preset.quantize.calibration_sequences]
    longest = job.preset.distill.max_tokens
    return [collate(part, longest).to(job.device) for part in split(rollouts, CALIBRATION_BATCH)]


def describe_student(
    job: Job, student: Student, name: str, per_document: PerDocument, seconds: float = 0.0
) -> QuantizeReport:
    """Put together what quantize.json says of a student in memory."""
    quantized = sum(weight.codes.numel() for weight in student.weights.values())
    return QuantizeReport(
        identity=name,
        teacher=job.fingerprint,
        skip=job.preset.quantize.skip,
        teacher_bytes=weights_bytes(job.folder),
        student_bytes=0,
        quantized_parameters=quantized,
        other_parameters=student.model.num_parameters() - quantized,
        layers=layer_errors(job.teacher, student.weights),
        yardstick=job.yardstick_identity,
        distribution=metrics.summarize(per_document),
        text=metrics.text_perplexity(student.model, job.text),
        teacher_text=job.teacher_text,
        seconds_s=seconds,
        versions=versions(),
        **grid_record(job.preset.quantize),
    )


def grid_record(settings: QuantizeSection) -> dict[str, Any]:
    """Return the fields that every report on a student has in common."""
    return settings.model_dump(include={"bits", "group_size", "symmetric", "method"})


def ensure_student(job: Job) -> None:
    """Make ``student/`` where it is missing."""
    if not job.processes.on_main((job.run.student / "quantize.json").exists):
        job.reporter.note("no student yet: quantizing first")
        quantize(job)
