"""The first stage: the PTQ student, and post-training methods side by side."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdctl.base.errors import StoreError
from kdctl.config.preset import QuantizeSection
from kdctl.config.resolve import identity
from kdctl.eval import distribution
from kdctl.formats.kernels import vllm_misfits
from kdctl.formats.offsets import save_offsets
from kdctl.formats.student import Student, check_sums
from kdctl.model.batch import Batch, collate, split
from kdctl.model.folder import weights_bytes
from kdctl.model.load import skeleton
from kdctl.model.teacher import Teacher
from kdctl.quant.affine import grid_of
from kdctl.quant.apply import Parts, layer_errors, sqnr, student_of
from kdctl.quant.methods import QUANTIZERS
from kdctl.quant.quantizer import QuantizeContext
from kdctl.rollout.mapped import numbers
from kdctl.rollout.store import RolloutStore
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import MethodResult, QuantizeReport, Rollout
from kdctl.stages.context import Context, layers_of, versions
from kdctl.stages.publish import Described, publish_student
from kdctl.stages.rollout import ensure_rollouts, unmixed
from kdctl.stages.yardstick import Figures, Measuring, ensure_measuring, figures_of

CALIBRATION_BATCH = 16


@dataclass(frozen=True)
class Recipe:
    """What decides a PTQ student. calibration: the store that a method with calibration data reads."""

    settings: QuantizeSection
    identity: str
    calibration: RolloutStore | None


def quantize(
    context: Context, teacher: Teacher, measuring: Measuring | None = None, *, force: bool = False
) -> QuantizeReport:
    """Make ``student/`` from the teacher by post-training quantization, unless it is complete."""
    path = context.paths.student / "quantize.json"
    if force or not context.ranks.on_main(path.exists):
        return _make_once(context, teacher, measuring, force=force)
    recipe = recipe_of(context, teacher, context.preset.quantize)
    return context.on_main(lambda main: _finished(main, recipe, path))


def _make_once(
    context: Context, teacher: Teacher, measuring: Measuring | None, *, force: bool = False, why: str = ""
) -> QuantizeReport:
    """Make ``student/`` unless another process has done so meanwhile. why: said by the one that makes it."""
    path = context.paths.student / "quantize.json"
    with context.claimed("student"):
        there = not force and context.ranks.on_main(path.exists)
        if why and not there:
            context.reporter.note(why)
        recipe = recipe_of(context, teacher, context.preset.quantize)
        if there:
            return context.on_main(lambda main: _finished(main, recipe, path))
        found = measuring or ensure_measuring(context, teacher)
        return context.on_main(lambda main: _make(main, teacher, found, recipe, path))


def _finished(context: Context, recipe: Recipe, path: Path) -> QuantizeReport:
    """Return what is said of the student that is there. Raises StoreError if another teacher or settings made it."""
    found = read_made(path, recipe)
    check_sums(path.parent)
    context.reporter.note(f"quantize: {path.parent} is complete, skipped")
    return found


def read_made(path: Path, recipe: Recipe) -> QuantizeReport:
    """Read what is said of a student. Raises StoreError if another teacher or settings made it."""
    found = read_record(path, QuantizeReport)
    if found.identity != recipe.identity:
        raise StoreError(
            f"{path.parent} was made from another teacher, or with another value of a setting in the preset's quantize "
            "section or of teacher.dtype; put preset.json back as it was, or use another --run"
        )
    return found


def _make(context: Context, teacher: Teacher, measuring: Measuring, recipe: Recipe, path: Path) -> QuantizeReport:
    """Make the student, measure it and publish it."""
    say_misfits(context, teacher)
    measuring.read()
    student, seconds = make_student(context, teacher, recipe)
    figures = figures_of(measuring, student.model, "student")
    report = describe_student(context, measuring, student, recipe.identity, figures, seconds)
    save_offsets(context.paths.offsets, student.weights, recipe.identity)
    publish_student(context, teacher, path.parent, student, Described(report, figures.per_document))
    return read_record(path, QuantizeReport)


def say_misfits(context: Context, teacher: Teacher) -> None:
    """Say, where the preset has vLLM serve the student, for which of its versions the grid or a shape has no kernel."""
    if "vllm" in (context.preset.rollout.serve or ""):
        empty, names = skeleton(teacher.config()), layers_of(teacher, context.preset)
        weights = {name: empty.get_parameter(f"{name}.weight") for name in names}
        shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
        for text in vllm_misfits(grid_of(context.preset.quantize), shapes):
            context.reporter.note(f"warning: {text}")


def compare(
    context: Context, teacher: Teacher, sections: Sequence[QuantizeSection], *, force: bool = False
) -> list[MethodResult]:
    """Quantize and measure the teacher in several ways. Keeps their figures, not their students."""
    for settings in sections:
        QUANTIZERS[settings.method].check(settings)

    def compared(main: Context) -> list[MethodResult]:
        measuring = ensure_measuring(main, teacher)
        return [_compared(main, measuring, recipe_of(main, teacher, settings), force) for settings in sections]

    return context.on_main(compared)


def _compared(context: Context, measuring: Measuring, recipe: Recipe, force: bool) -> MethodResult:
    """Quantize with one method and measure, or read what was measured before."""
    with context.claimed(f"compare/{recipe.settings.method}"):
        return _measured_method(context, measuring, recipe, force)


def _measured_method(context: Context, measuring: Measuring, recipe: Recipe, force: bool) -> MethodResult:
    settings, path = recipe.settings, context.paths.compared(recipe.settings.method)
    if path.exists() and not force:
        found = read_record(path, MethodResult)
        if (found.identity, found.yardstick) == (recipe.identity, measuring.identity):
            context.reporter.note(f"compare: {path} is complete, skipped")
            return found
    teacher = measuring.teacher
    measuring.read()
    student, seconds = make_student(context, teacher, recipe)
    result = MethodResult(
        identity=recipe.identity,
        seconds_s=seconds,
        sqnr_db=sqnr(teacher.weight, student.weights),
        yardstick=measuring.identity,
        distribution=distribution.summarize(measuring.measure(student.model, settings.method)),
        text=distribution.text_perplexity(student.model, measuring.text()),
        versions=versions(),
        **grid_record(settings),
    )
    write_record(path, result)
    return result


def recipe_of(
    context: Context, teacher: Teacher, settings: QuantizeSection, calibration: RolloutStore | None = None
) -> Recipe:
    """Put together what decides a PTQ student, filling the calibration store where it is missing.

    calibration: a store that is there, whatever the preset now says of rollouts.
    """
    if settings.calibrated and calibration is None:
        calibration = ensure_rollouts(unmixed(context), teacher, settings.calibration_source)
    inputs = {"teacher": teacher.fingerprint()} | ({"calibration": calibration.fingerprint()} if calibration else {})
    name = identity("quantize", {"quantize": settings.decisive(), "dtype": str(teacher.dtype)}, inputs)
    return Recipe(settings, name, calibration)


def make_student(context: Context, teacher: Teacher, recipe: Recipe) -> tuple[Student, float]:
    """Quantize the teacher, which is forgotten; also return how long it took, in seconds."""
    started, method, names = time.perf_counter(), recipe.settings.method, layers_of(teacher, context.preset)
    given = QuantizeContext(
        teacher=teacher.load(),
        layers=names,
        settings=recipe.settings,
        batches=calibration_batches(context, teacher, recipe.calibration) if recipe.calibration else (),
        folder=teacher.folder(),
        seed=context.preset.rollout.seed,
        reporter=context.reporter,
    )
    weights = QUANTIZERS[method].quantize(given)
    seconds = time.perf_counter() - started
    parts = Parts.of(teacher.load())
    del given
    teacher.forget()  # so that each of its weights is freed where the student's takes its place
    return Student(student_of(parts, weights), weights), seconds


def calibration_batches(context: Context, teacher: Teacher, store: RolloutStore) -> list[Batch]:
    """Cut the first sequences of a store into batches, prompts and completions together."""
    rollouts = by_generation(store.read(), context.preset.quantize.calibration_sequences)
    longest = context.preset.distill.max_tokens
    return [collate(part, longest).to(teacher.device) for part in split(rollouts, CALIBRATION_BATCH)]


def by_generation(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """Return the first ``count`` rollouts if the first completion of every prompt comes before any second one."""
    order = np.argsort(numbers(rollouts, "sample_index"), kind="stable")
    return [rollouts[int(place)] for place in order[:count]]


def describe_student(
    context: Context,
    measuring: Measuring,
    student: Student,
    name: str,
    figures: Figures,
    seconds: float = 0.0,
) -> QuantizeReport:
    """Put together what quantize.json says of a student in memory."""
    teacher, quantized = measuring.teacher, sum(weight.codes.numel() for weight in student.weights.values())
    return QuantizeReport(
        identity=name,
        teacher=teacher.fingerprint(),
        skip=context.preset.quantize.skip,
        teacher_bytes=weights_bytes(teacher.folder()),
        student_bytes=0,
        quantized_parameters=quantized,
        other_parameters=student.model.num_parameters() - quantized,
        layers=layer_errors(teacher.weight, student.weights),
        yardstick=measuring.identity,
        distribution=distribution.summarize(figures.per_document),
        text=figures.text,
        teacher_text=figures.teacher_text,
        seconds_s=seconds,
        versions=versions(),
        **grid_record(context.preset.quantize),
    )


def grid_record(settings: QuantizeSection) -> dict[str, Any]:
    """Return the fields that every report on a student has in common."""
    return settings.model_dump(include={"bits", "group_size", "symmetric", "method"})


def ensure_student(context: Context, teacher: Teacher, measuring: Measuring | None = None) -> None:
    """Make ``student/`` where it is missing. Raises StoreError if the one there is damaged, or made otherwise."""
    path, settings = context.paths.student / "quantize.json", context.preset.quantize
    if not context.ranks.on_main(path.exists):
        _make_once(context, teacher, measuring, why="no student yet: quantizing first")
        return
    context.on_main(lambda main: check_sums(main.paths.student))
    store = RolloutStore(context.paths.rollouts(settings.calibration_source)) if settings.calibrated else None
    if store is None or store.finished:
        recipe = recipe_of(context, teacher, settings, store)
        context.on_main(lambda _: read_made(path, recipe))
