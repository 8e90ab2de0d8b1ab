"""Training of one variant, from the PTQ student to ``final/`` (layer 4)."""

import re
import shutil
from statistics import median
from typing import Any

from kdctl import metrics, stats
from kdctl.card import Training
from kdctl.distill.feed import Feed, Live, Recorded, Replay
from kdctl.distill.loop import Outputs, Trainer, objective_of, train
from kdctl.errors import PresetError, StoreError
from kdctl.job import Job, versions
from kdctl.metrics import PerDocument
from kdctl.preset import DistillSection, Preset
from kdctl.quant.apply import share_frozen
from kdctl.quant.checkpoint import Student, load_student
from kdctl.quant.shadow import make_shadow
from kdctl.records import DistillReport
from kdctl.resolve import identity
from kdctl.rollout.states import TeacherStates
from kdctl.rollout.store import RolloutStore
from kdctl.rundir import VariantDir, read_record, write_record
from kdctl.stages.gates import check_gap
from kdctl.stages.quantizing import describe_student, ensure_student, grid_record
from kdctl.stages.rollouts import Stores, filled, needed_sources, teacher_states
from kdctl.students import write_student
from kdctl.tracking import Tracker, open_wandb, read_metrics


def variant_name(settings: DistillSection, base: DistillSection) -> str:
    """Name a variant after λ, β, learning rate and seed, then whatever else differs from the run's preset."""
    always = {"lmbda", "beta", "lr", "seed"}
    name = f"lambda{settings.lmbda:g}_beta{settings.beta:g}_lr{settings.lr:g}_seed{settings.seed}"
    for key, value in settings.model_dump().items():
        if key not in always and value != base.model_dump()[key]:
            name += f"_{key}{value:g}" if isinstance(value, float) else f"_{key}{value}"
    return name


def check_name(name: str, option: str = "--name") -> str:
    """Return a model's name. Raises PresetError if it cannot be one: it names folders, beside teacher and ptq."""
    if not re.fullmatch(r"\w[\w.=+-]*", name) or name in ("teacher", "ptq"):
        raise PresetError(
            f"{option} {name!r} cannot name a variant; use letters, digits and ._=+-, and neither teacher nor ptq"
        )
    return name


def distill(job: Job, name: str | None = None, force: bool = False, min_gap: float = 0.0) -> DistillReport:
    """Train one variant and write its ``final/`` folder.

    Raises TrainingError, before rollouts and training, unless the PTQ student's gap is surely ``min_gap`` nats a token.
    """
    base = read_record(job.run.preset, Preset).distill
    variant = job.run.variant(check_name(name) if name else variant_name(job.preset.distill, base))
    if job.preset.distill.replay is not None:
        recorded(job, job.preset.distill.replay)
    ensure_student(job)
    if variant.report.exists() and not force:
        return _finished(job, variant)
    before = measured_ptq(job)
    check_gap(job, before, min_gap)
    stores = _stores(job)
    name_now = _distill_identity(job, stores)
    if force:
        shutil.rmtree(variant.path, ignore_errors=True)
    ptq = load_student(job.run.student, job.device)
    share_frozen(ptq.model, job.teacher, ptq.weights)
    student = _train(job, variant, ptq, stores, name_now)
    return _finish_variant(job, variant, student, before, stores, name_now)


def measured_ptq(job: Job) -> PerDocument:
    """Return the PTQ student's distance from the teacher on the yardstick, which its folder states."""
    stated = job.measured(job.run.student)
    return stated or job.measure(load_student(job.run.student, job.device).model, "PTQ student")


def _stores(job: Job) -> Stores:
    """Return the finished stores that the preset reads, filled where they are missing."""
    return {source: filled(job, source) for source in needed_sources(job.preset)}


def _finished(job: Job, variant: VariantDir) -> DistillReport:
    """Return a finished variant's report. Raises StoreError if it was trained with other settings or inputs."""
    found = read_record(variant.report, DistillReport)
    if found.identity != _distill_identity(job, _stores(job)):
        raise StoreError(
            f"{variant.path} was trained with other settings or from other inputs; --name keeps both, --force redoes it"
        )
    job.reporter.note(f"distill: {variant.path} is complete, skipped")
    return found


def _distill_identity(job: Job, stores: Stores) -> str:
    """Hash the distill section and what it reads; live generation reads the rollout section and prompts too."""
    sections: dict[str, Any] = {"distill": job.preset.distill}
    inputs = {"student": job.student_fingerprint, "teacher": job.fingerprint}
    inputs |= {source: store.fingerprint() for source, store in stores.items()}
    if job.preset.distill.live:
        sections["rollout"] = job.preset.rollout
        inputs["prompts"] = job.train_prompts().fingerprint()
    if job.preset.distill.replay is not None:
        inputs["replay"] = recorded(job, job.preset.distill.replay).fingerprint()
    if job.preset.rollout.keep_states != "no":
        sections["states"] = job.preset.rollout.keep_states
    return identity("distill", sections, inputs)


def _train(job: Job, variant: VariantDir, ptq: Student, stores: Stores, name: str) -> Student:
    """Run the training loop and return the trained student."""
    settings = job.preset.distill
    shadow = make_shadow(settings, ptq.model, ptq.weights, job.teacher)
    feed, states = _feed(job, variant, ptq, stores, name)
    trainer = Trainer(job.teacher, ptq.model, shadow, feed, settings, states)
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


def recorded(job: Job, name: str) -> RolloutStore:
    """Return the live rollouts of another variant. Raises StoreError if it has none."""
    store = RolloutStore(job.run.variant(name).rollouts)
    if not store.manifest_path.exists():
        raise StoreError(
            f"distill.replay={name!r}: no live rollouts in {store.path}; name a finished variant that generated its own"
        )
    return store


def _feed(job: Job, variant: VariantDir, ptq: Student, stores: Stores, name: str) -> tuple[Feed, TeacherStates | None]:
    """Put together where each row of a step comes from, and the teacher's states of it where they are kept."""
    settings = job.preset.distill
    off_policy = stores[settings.off_policy_source].read() if settings.lmbda < 1 else []
    if settings.lmbda == 0:
        return Feed(settings, off_policy), teacher_states(job, stores.values())
    if settings.replay is not None:
        store = recorded(job, settings.replay)
        feed = Feed(settings, off_policy, Recorded(store.read(), settings.replay))
        return feed, teacher_states(job, [*stores.values(), store])
    states = teacher_states(job, stores.values())
    if not settings.live:
        return Feed(settings, off_policy, Replay(stores["student"].read(), settings.seed)), states
    generator = job.generator(ptq.model, "student")
    prompts, store = job.train_prompts().prompts, RolloutStore(variant.rollouts)
    live = Live(settings, prompts, generator, store, name, job.student_fingerprint)
    if states is not None:
        live.keep = lambda entry, rollouts: states.add(store, entry, rollouts, job.teacher)
    return Feed(settings, off_policy, live), states


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
    if settings.live:
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
        **grid_record(job.preset.quantize),
    )
    write_record(variant.report, report)
    return report
