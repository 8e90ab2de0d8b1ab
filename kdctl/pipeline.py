"""One short function a stage; the only place where stages meet.

A stage whose outputs are complete and whose identity (a hash of the preset sections it reads and of its inputs) matches
is skipped with one line. A stage makes what it lacks from an earlier one, saying so.
"""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from kdctl import metrics, models, stats
from kdctl.card import Training
from kdctl.distill.batch import Batch, micro_batches
from kdctl.distill.feed import Feed, Live, Replay
from kdctl.distill.loop import Outputs, Trainer, objective_of, train
from kdctl.errors import DataError, PresetError, StoreError
from kdctl.foreign import Foreign, check_comparable, find_foreign, load_foreign
from kdctl.job import Job, Measured, versions
from kdctl.metrics import PerDocument
from kdctl.preset import DistillSection, Preset, Source
from kdctl.prompts import PromptSet, as_rollout
from kdctl.quant.apply import build_student, layer_errors, quantize_calibrated, quantize_layers, share_frozen
from kdctl.quant.checkpoint import Student, check_sums, load_student
from kdctl.quant.shadow import make_shadow
from kdctl.records import DistillReport, EvalResult, QuantizeReport, Rollout, StoreManifest
from kdctl.report import write_report
from kdctl.resolve import identity, variant_name
from kdctl.rollout.generate import Sampling
from kdctl.rollout.plan import Plan, fill, fill_from_dataset, usable
from kdctl.rollout.store import RolloutStore
from kdctl.rundir import VariantDir, read_record, write_record
from kdctl.students import write_student
from kdctl.tracking import Tracker, open_wandb, read_metrics

Stores = dict[Source, RolloutStore]
CALIBRATION_BATCH = 16


# --- quantize ---------------------------------------------------------------------------------------------------------


def quantize(job: Job, force: bool = False) -> QuantizeReport:
    """Make ``student/`` from the teacher by post-training quantization."""
    settings, inputs = job.preset.quantize, {"teacher": job.fingerprint}
    calibration = _filled(job, settings.calibration_source) if settings.method == "gptq" else None
    if calibration is not None:
        inputs["calibration"] = calibration.fingerprint()
    name = identity("quantize", {"quantize": settings, "dtype": str(job.dtype)}, inputs)
    report = job.run.student / "quantize.json"
    if report.exists() and not force:
        found = read_record(report, QuantizeReport)
        if found.identity == name:
            check_sums(job.run.student)
            job.reporter.note(f"quantize: {job.run.student} is complete, skipped")
            return found
        raise StoreError(f"{job.run.student} was made from another teacher or with other settings; use another --run")
    started = time.perf_counter()
    with job.reporter.task(f"quantizing {len(job.layers)} layers", "layers") as advance:
        if calibration is None:
            weights = quantize_layers(job.teacher, job.layers, settings, advance)
        else:
            batches = calibration_batches(job, calibration)
            weights = quantize_calibrated(job.teacher, job.layers, settings, batches, advance)
    seconds = time.perf_counter() - started
    student = Student(build_student(job.teacher, weights), weights)
    per_document = job.measure(student.model, "student")
    described = describe_student(job, student, name, per_document, seconds)
    write_student(job, job.run.student, student, described, per_document)
    return read_record(report, QuantizeReport)


def calibration_batches(job: Job, store: RolloutStore) -> list[Batch]:
    """Cut the first sequences of a store into padded batches, prompts and completions together."""
    rollouts = store.read()[: job.preset.quantize.calibration_sequences]
    batches = micro_batches(rollouts, CALIBRATION_BATCH, job.pad_id, job.preset.distill.max_tokens)
    return [batch.to(job.device) for batch in batches]


def describe_student(
    job: Job, student: Student, name: str, per_document: PerDocument, seconds: float = 0.0
) -> QuantizeReport:
    """Put together what quantize.json says of a student in memory."""
    quantized = sum(weight.codes.numel() for weight in student.weights.values())
    return QuantizeReport(
        identity=name,
        teacher=job.fingerprint,
        skip=job.preset.quantize.skip,
        teacher_bytes=models.weights_bytes(job.folder),
        student_bytes=0,
        quantized_parameters=quantized,
        other_parameters=student.model.num_parameters() - quantized,
        layers=layer_errors(job.teacher, student.weights),
        yardstick=job.yardstick_identity,
        distribution=metrics.summarize(per_document),
        text=metrics.text_perplexity(student.model, job.text, job.pad_id),
        teacher_text=job.teacher_text,
        seconds_s=seconds,
        versions=versions(),
        **grid_record(job.preset),
    )


def grid_record(preset: Preset) -> dict[str, Any]:
    """Return the fields that every student folder's report has in common."""
    return preset.quantize.model_dump(include={"bits", "group_size", "symmetric", "method"})


def ensure_student(job: Job) -> None:
    """Make ``student/`` where it is missing."""
    if not (job.run.student / "quantize.json").exists():
        job.reporter.note("no student yet: quantizing first")
        quantize(job)


# --- rollout ----------------------------------------------------------------------------------------------------------


def needed_sources(preset: Preset) -> list[Source]:
    """List the stores that the preset's λ and off-policy source read; live generation needs no student store."""
    sources: list[Source] = []
    if preset.distill.lmbda < 1:
        sources.append(preset.distill.off_policy_source)
    if preset.distill.lmbda > 0 and not live(preset.distill):
        sources.append("student")
    return sources


def live(settings: DistillSection) -> bool:
    """Tell whether student rollouts are generated during training."""
    return settings.lmbda > 0 and settings.refresh_every > 0


def rollout(job: Job, source: Source, force: bool = False) -> StoreManifest:
    """Fill one rollout store: student- or teacher-written completions, or those of a data set."""
    store = RolloutStore(job.run.rollouts(source))
    if force:
        shutil.rmtree(store.path, ignore_errors=True)
    if not fill_source(job, source, store):
        job.reporter.note(f"rollout: {store.path} is complete, skipped")
    return store.manifest()


def fill_source(job: Job, source: Source, store: RolloutStore) -> bool:
    """Fill a store unless it is complete; tell whether anything was done."""
    settings, prompts = job.preset.rollout, job.train_prompts(answers=source == "dataset")
    if source == "student":
        ensure_student(job)
    writer = {
        "student": lambda: job.student_fingerprint,
        "teacher": lambda: job.fingerprint,
        "dataset": prompts.fingerprint,
    }[source]()
    inputs = {"writer": writer, "prompts": prompts.fingerprint(), "source": source}
    name = identity("rollout", {"rollout": settings}, inputs)
    plan = Plan(source, name, writer, prompts, settings.prompts_per_block, settings.num_generations)
    if usable(store, name):
        return False
    if source == "dataset":
        fill_from_dataset(store, plan, dataset_rollouts(job, prompts))
    else:
        model = job.teacher if source == "teacher" else load_student(job.run.student, job.device).model
        fill(store, plan, job.generator(model, Sampling.of(settings), source), job.reporter)
    return True


def examples(job: Job, source: Source, count: int) -> list[tuple[str, str]]:
    """Decode the first prompts and completions of a store."""
    rollouts = RolloutStore(job.run.rollouts(source)).read()[:count]
    decode = job.tokenizer.decode
    return [(str(decode(r.prompt_ids)), str(decode(r.completion_ids))) for r in rollouts]


def dataset_rollouts(job: Job, prompts: PromptSet) -> list[Rollout]:
    """Return a data set's completions, cut at ``max_new_tokens``. Raises DataError if all are empty."""
    settings = job.preset.rollout
    rollouts = [as_rollout(prompt, settings.seed, settings.max_new_tokens, job.stop_ids) for prompt in prompts.prompts]
    rollouts = [rollout for rollout in rollouts if rollout.completion_ids]
    if not rollouts:
        raise DataError(
            f"every answer in prompts.train={job.preset.prompts.train!r} is empty; there is nothing to learn"
        )
    return rollouts


# --- distill ----------------------------------------------------------------------------------------------------------


def check_name(name: str, option: str = "--name") -> str:
    """Return a model's name. Raises PresetError if it cannot be one: it names folders, beside teacher and ptq."""
    if not re.fullmatch(r"\w[\w.=+-]*", name) or name in ("teacher", "ptq"):
        raise PresetError(
            f"{option} {name!r} cannot name a variant; use letters, digits and ._=+-, and neither teacher nor ptq"
        )
    return name


def distill(job: Job, name: str | None = None, force: bool = False) -> DistillReport:
    """Train one variant and write its ``final/`` folder."""
    base = read_record(job.run.preset, Preset).distill
    variant = job.run.variant(check_name(name) if name else variant_name(job.preset.distill, base))
    stores = shared_stages(job)
    name_now = _distill_identity(job, stores)
    if force:
        shutil.rmtree(variant.path, ignore_errors=True)
    if variant.report.exists():
        found = read_record(variant.report, DistillReport)
        if found.identity == name_now:
            job.reporter.note(f"distill: {variant.path} is complete, skipped")
            return found
        raise StoreError(
            f"{variant.path} was trained with other settings or from other inputs; --name keeps both, --force redoes it"
        )
    ptq = load_student(job.run.student, job.device)
    share_frozen(ptq.model, job.teacher, ptq.weights)
    before = job.measure_student(job.run.student, ptq.model, "PTQ student").per_document
    student = _train(job, variant, ptq, stores, name_now)
    return _finish_variant(job, variant, student, before, stores, name_now)


def shared_stages(job: Job) -> Stores:
    """Make what all variants of a run share, where it is missing: student, yardstick and the stores that are read."""
    ensure_student(job)
    _ = job.heldout_store
    return {source: _filled(job, source) for source in needed_sources(job.preset)}


def _filled(job: Job, source: Source) -> RolloutStore:
    """Return a finished store, filling it first where it is missing."""
    store = RolloutStore(job.run.rollouts(source))
    if not store.manifest_path.exists():
        job.reporter.note(f"no {source} rollouts yet: making them first")
    fill_source(job, source, store)
    return store


def _distill_identity(job: Job, stores: Stores) -> str:
    """Hash the distill section and what it reads; live generation reads the rollout section and prompts too."""
    sections: dict[str, Any] = {"distill": job.preset.distill}
    inputs = {"student": job.student_fingerprint, "teacher": job.fingerprint}
    inputs |= {source: store.fingerprint() for source, store in stores.items()}
    if live(job.preset.distill):
        sections["rollout"] = job.preset.rollout
        inputs["prompts"] = job.train_prompts().fingerprint()
    return identity("distill", sections, inputs)


def _train(job: Job, variant: VariantDir, ptq: Student, stores: Stores, name: str) -> Student:
    """Run the training loop and return the trained student."""
    settings = job.preset.distill
    shadow = make_shadow(settings, ptq.model, ptq.weights, job.teacher)
    feed = _feed(job, variant, ptq, stores, name)
    trainer = Trainer(job.teacher, ptq.model, shadow, feed, settings, job.pad_id)
    small = job.small_yardstick(settings.heldout_documents)

    def tracker(resume_step: int) -> Tracker:
        config = {**job.preset.model_dump(mode="json"), "variant": variant.name}
        return Tracker(
            variant.metrics, resume_step, open_wandb(job.preset.tracking, job.run.path, variant.name, config)
        )

    with job.reporter.task(f"distilling {variant.name}", "steps") as advance:
        train(trainer, small, Outputs(variant.checkpoints, tracker, name, advance, job.reporter.note))
    weights = dict(shadow.quantized())
    shadow.detach()
    return Student(ptq.model, weights)


def _feed(job: Job, variant: VariantDir, ptq: Student, stores: Stores, name: str) -> Feed:
    """Put together where each row of a step comes from."""
    settings = job.preset.distill
    off_policy = stores[settings.off_policy_source].read() if settings.lmbda < 1 else []
    if settings.lmbda == 0:
        return Feed(settings, off_policy)
    if not live(settings):
        return Feed(settings, off_policy, Replay(stores["student"].read(), settings.seed))
    generator = job.generator(ptq.model, Sampling.of(job.preset.rollout), "student")
    prompts, store = job.train_prompts().prompts, RolloutStore(variant.rollouts)
    return Feed(settings, off_policy, Live(settings, prompts, generator, store, name, job.student_fingerprint))


def _finish_variant(
    job: Job,
    variant: VariantDir,
    student: Student,
    before: PerDocument,
    stores: Stores,
    name: str,
) -> DistillReport:
    """Measure the trained student, write ``final/`` and then ``distill.json``."""
    after = job.measure(student.model, "distilled student")
    described = describe_student(job, student, name, after)
    summary, removed = metrics.summarize(before), stats.removed(after.forward_kl, before.forward_kl)
    training = Training(variant.name, job.preset.distill, summary, removed)
    write_student(job, variant.final, student, described, after, training)
    settings, lines = job.preset.distill, read_metrics(variant.metrics)
    if live(settings):
        stores = {**stores, "student": RolloutStore(variant.rollouts)}
    step_seconds = [line["time/step_s"] for line in lines]
    report = DistillReport(
        identity=name,
        teacher=job.fingerprint,
        variant=variant.name,
        settings=settings.model_dump(),
        student=job.student_fingerprint,
        stores={source: store.fingerprint() for source, store in stores.items()},
        before=summary,
        after=metrics.summarize(after),
        removed=removed,
        final_loss=lines[-1][f"train/{objective_of(settings).name}"],
        steps=settings.steps,
        train_seconds_s=sum(step_seconds),
        step_seconds_median_s=median(step_seconds),
        completion_tokens_trained=int(sum(line["train/completion_tokens"] for line in lines)),
        versions=versions(),
        **grid_record(job.preset),
    )
    write_record(variant.report, report)
    return report


# --- eval -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate. foreign: where it came from, if kdctl did not make it here."""

    name: str
    folder: Path
    foreign: Foreign | None = None


def evaluate(
    job: Job, names: Sequence[str] = (), force: bool = False, also: Foreign | None = None
) -> dict[str, EvalResult]:
    """Evaluate teacher, PTQ student and every variant, or only those named, and ``also`` a model made elsewhere.

    Tasks are loaded before any model.
    """
    known = _candidates(job, also)
    for name in names:
        if name not in known:
            raise DataError(f"no model {name!r} in {job.run.path}; there are {', '.join(known)}")
    chosen = [one for one in known.values() if not names or one.name in names or one.foreign]
    pending = [one for one in chosen if force or not _evaluated(job, one)]
    for one in chosen:
        if one not in pending:
            job.reporter.note(f"eval: {one.name} is complete, skipped")
    if pending:
        from kdctl.evaluate import build_tasks  # lm-eval takes seconds to import; only this stage needs it

        tasks = build_tasks(job.preset.eval, job.offline)
        ensure_student(job)
        for one in pending:
            _evaluate_one(job, one, tasks)
    return {one.name: read_record(job.run.eval(one.name) / "results.json", EvalResult) for one in chosen}


def open_foreign(job: Job, name: str, reference: str) -> Foreign:
    """Find a model made elsewhere for a row of its own."""
    return find_foreign(check_name(name, "--as"), reference, job.dtype, job.offline)


def _candidates(job: Job, also: Foreign | None) -> dict[str, Candidate]:
    """List what can be evaluated, by name, in the order of the report."""
    variants = [Candidate(variant.name, variant.final) for variant in job.run.variants()]
    found = [Candidate("teacher", job.folder), Candidate("ptq", job.run.student)]
    if also is not None:
        if also.name in {variant.name for variant in variants}:
            raise PresetError(f"--as {also.name!r} is the name of a variant in {job.run.path}; choose another")
        check_comparable(also, job.tokenizer, job.config)
        found.append(Candidate(also.name, also.folder, also))
    return {one.name: one for one in [*found, *variants]}


def _eval_identity(job: Job, one: Candidate) -> str:
    inputs = {
        "weights": models.fingerprint(one.folder),
        "teacher": job.fingerprint,
        "heldout": job.heldout_store.fingerprint(),
        "lm_eval": version("lm-eval"),
    }
    return identity("eval", {"eval": job.preset.eval, "text_tokens": job.preset.heldout.text_tokens}, inputs)


def _evaluated(job: Job, one: Candidate) -> bool:
    """Tell whether results of the same model, tasks, limit and yardstick are there."""
    results = job.run.eval(one.name) / "results.json"
    return results.exists() and read_record(results, EvalResult).identity == _eval_identity(job, one)


def _evaluate_one(job: Job, one: Candidate, tasks: dict[str, Any]) -> None:
    """Score one model on the tasks and the yardstick and write its results, items first."""
    from kdctl.evaluate import score_tasks, write_items

    started, folder = time.perf_counter(), job.run.eval(one.name)
    model = _load(job, one)
    with job.reporter.task(f"evaluating {one.name}", "documents") as advance:
        scores, items = score_tasks(
            model, job.tokenizer, tasks, job.preset.eval, lambda _, done, total: advance(done, total)
        )
    measured = _measure(job, one, model)
    write_items(folder, items | {"heldout": metrics.as_table(measured.per_document)})
    report = job.run.variant(one.name).report
    result = EvalResult(
        model=one.name,
        identity=_eval_identity(job, one),
        weights=models.fingerprint(one.folder),
        limit=job.preset.eval.limit,
        tasks=scores,
        distribution=metrics.summarize(measured.per_document),
        text=measured.text,
        size_bytes=models.weights_bytes(one.folder),
        seconds_s=time.perf_counter() - started,
        versions=versions(),
        settings=read_record(report, DistillReport).settings if report.exists() and not one.foreign else {},
        reference=one.foreign.reference if one.foreign else None,
    )
    write_record(folder / "results.json", result)


def _load(job: Job, one: Candidate) -> PreTrainedModel:
    if one.name == "teacher":
        return job.teacher
    if one.foreign:
        return load_foreign(one.foreign, job.dtype, job.device)
    return load_student(one.folder, job.device).model


def _measure(job: Job, one: Candidate, model: PreTrainedModel) -> Measured:
    """Measure a model on the yardstick and on plain text, or read what was measured when it was made."""
    if one.name == "teacher":
        return Measured(metrics.compare_teacher(job.yardstick), job.teacher_text)
    if one.foreign:
        return Measured(job.measure(model, one.name), metrics.text_perplexity(model, job.text, job.pad_id))
    return job.measure_student(one.folder, model, one.name)


# --- report and run ---------------------------------------------------------------------------------------------------


def run_all(job: Job) -> str:
    """Run the five stages in order, skipping complete ones. In a new folder the tasks are checked before the work."""
    if not job.run.eval_root.exists():
        from kdctl.evaluate import build_tasks

        build_tasks(job.preset.eval, job.offline)
    quantize(job)
    for source in needed_sources(job.preset):
        rollout(job, source)
    distill(job)
    evaluate(job)
    return write_report(job.run)
