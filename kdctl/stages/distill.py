"""Training of one variant, from the PTQ student to ``final/``."""

import re
import shutil
from dataclasses import dataclass
from statistics import median
from typing import Any

from kdctl import stats
from kdctl.base.errors import PresetError, StoreError
from kdctl.config.preset import Preset
from kdctl.config.resolve import identity, variant_name
from kdctl.distill.feed import Feed, Live, Recorded, Replay
from kdctl.distill.fsdp import local_rows, shard, whole_rows
from kdctl.distill.loop import Outputs, Trainer, objective_of, train
from kdctl.distill.monitor import Outcome
from kdctl.distill.shadow import make_shadow
from kdctl.eval import distribution as metrics
from kdctl.eval.distribution import PerDocument
from kdctl.formats.model_card import Training
from kdctl.formats.student import Student, load_student
from kdctl.model.activation_checkpointing import set_checkpointing
from kdctl.quant.apply import build_student, share_frozen
from kdctl.rollout.store import RolloutStore
from kdctl.rollout.teacher_states import TeacherStates
from kdctl.run.paths import VariantDir, read_record, write_record
from kdctl.run.records import DistillReport, DistributionMetrics, Estimate
from kdctl.run.tracking import Tracker, Untracked, Watch, open_wandb, read_metrics
from kdctl.stages.context import Job, versions
from kdctl.stages.gate import check_gap
from kdctl.stages.publish import accept_student, write_student
from kdctl.stages.quantize import describe_student, ensure_student, grid_record
from kdctl.stages.rollout import Stores, filled, needed_sources, teacher_states
from kdctl.system.memory import give_back


@dataclass(frozen=True)
class Trained:
    """How training ended, and what is said of the student that it left."""

    outcome: Outcome
    before: DistributionMetrics
    after: DistributionMetrics
    removed: Estimate


def check_name(name: str, option: str = "--name") -> str:
    """Return a model's name. Raises PresetError if it cannot be one: it names folders, beside teacher and ptq."""
    if not re.fullmatch(r"\w[\w.=+-]*", name) or name in ("teacher", "ptq"):
        raise PresetError(
            f"{option} {name!r} cannot name a variant; use letters, digits and ._=+-, and neither teacher nor ptq"
        )
    return name


def distill(
    job: Job, name: str | None = None, force: bool = False, min_gap: float = 0.0, watch: Watch | None = None
) -> DistillReport:
    """Train one variant and write its ``final/`` folder. ``watch`` is told of every step and may end it by raising.

    Raises TrainingError, before rollouts and training, unless the PTQ student's gap is surely ``min_gap`` nats a token.
    """
    job.processes.check_trainable(job.preset.distill)
    base = read_record(job.run.preset, Preset).distill
    variant = job.run.variant(check_name(name) if name else variant_name(job.preset.distill, base))
    if job.preset.distill.replay is not None:
        recorded(job, job.preset.distill.replay)
    ensure_student(job)
    if not force and job.processes.on_main(variant.report.exists):
        return _finished(job, variant)
    before = measured_ptq(job)
    check_gap(job, before, min_gap)
    stores = shared_stages(job)
    name_now = _distill_identity(job, stores)
    if force:
        job.on_main(lambda: shutil.rmtree(variant.path, ignore_errors=True))
    trained = _train(job, variant, before, stores, name_now, watch)
    return job.on_main(lambda: _finish_variant(job, variant, trained, stores, name_now))


def measured_ptq(job: Job) -> PerDocument:
    """Return the PTQ student's distance from the teacher on the yardstick, which its folder states."""
    stated = job.measured(job.run.student)
    return stated or job.measure(load_student(job.run.student, job.device).model, "PTQ student")


def _finished(job: Job, variant: VariantDir) -> DistillReport:
    """Return a finished variant's report. Raises StoreError if it was trained with other settings or inputs."""
    found = read_record(variant.report, DistillReport)
    if found.identity != _distill_identity(job, shared_stages(job)):
        raise StoreError(
            f"{variant.path} was trained with other settings or from other inputs; --name keeps both, --force redoes it"
        )
    job.reporter.note(f"distill: {variant.path} is complete, skipped")
    return found


def shared_stages(job: Job) -> Stores:
    """Make what all variants of a run share, where it is missing: student, yardstick and the stores that are read."""
    ensure_student(job)
    _ = job.heldout_store
    return {source: filled(job, source) for source in needed_sources(job.preset)}


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


def _train(
    job: Job, variant: VariantDir, before: PerDocument, stores: Stores, name: str, watch: Watch | None
) -> Trained:
    """Train the PTQ student and write it beside its place. It ends with this call: the gate needs its room."""
    student = load_student(job.run.student, job.device)
    share_frozen(student.model, job.teacher, student.weights)
    outcome = _run_loop(job, variant, student, stores, name, watch)
    if not job.processes.sharded:
        return job.on_main(lambda: _write_trained(job, variant, student, before, outcome, name))
    job.forget_teacher()
    return job.on_main(lambda: _write_trained(job, variant, _rebuilt(job, student), before, outcome, name))


def _rebuilt(job: Job, divided: Student) -> Student:
    """Build a student whose model is divided anew from its weights, which the main process has whole."""
    return Student(build_student(job.teacher, divided.weights), divided.weights)


def _run_loop(
    job: Job, variant: VariantDir, student: Student, stores: Stores, name: str, watch: Watch | None
) -> Outcome:
    """Run the training loop, which leaves the student as it is to be kept."""
    settings = job.preset.distill
    feed, states = _feed(job, variant, student, stores, name)
    if job.processes.sharded:
        for model in (job.teacher, student.model):
            shard(model, student.weights.keys(), job.processes)
    shadow = make_shadow(settings, student.model, local_rows(student.model, student.weights), job.teacher)
    student.weights.clear()  # a byte a weight that nothing reads until the new codes are taken
    set_checkpointing(student.model, job.preset.runtime.activation_checkpointing)
    trainer = Trainer(job.teacher, student.model, shadow, feed, settings, states)
    small = job.small_yardstick(settings.heldout_documents)
    give_back()

    def tracker(resume_step: int) -> Tracker:
        if not job.processes.is_main:
            return Untracked()
        config = {**job.preset.model_dump(mode="json"), "variant": variant.name}
        run = open_wandb(job.preset.tracking, job.run.path, variant.name, config)
        return Tracker(variant.metrics, resume_step, run, watch)

    with job.reporter.task(f"distilling {variant.name}", "steps") as advance:
        outputs = Outputs(variant.checkpoints, tracker, name, advance, job.reporter.note)
        outcome = train(trainer, small, outputs)
    student.weights.update(whole_rows(shadow.quantized(), job.processes))
    shadow.detach()
    return outcome


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
        return Feed(settings, off_policy, None, job.processes), teacher_states(job, stores.values())
    if settings.replay is not None:
        store = recorded(job, settings.replay)
        feed = Feed(settings, off_policy, Recorded(store.read(), settings.replay), job.processes)
        return feed, teacher_states(job, [*stores.values(), store])
    states = teacher_states(job, stores.values())
    if not settings.live:
        return Feed(settings, off_policy, Replay(stores["student"].read(), settings.seed), job.processes), states
    generator = job.generator(ptq.model, "student")
    prompts, store = job.train_prompts().prompts, RolloutStore(variant.rollouts)
    live = Live(settings, prompts, generator, store, name, job.student_fingerprint)
    if states is not None:
        live.keep = lambda entry, rollouts: states.add(store, entry, rollouts, job.teacher)
    return Feed(settings, off_policy, live, job.processes), states


def _write_trained(
    job: Job, variant: VariantDir, student: Student, before: PerDocument, outcome: Outcome, name: str
) -> Trained:
    """Measure the trained student and write it beside its place."""
    after = job.measure(student.model, "distilled student")
    described = describe_student(job, student, name, after)
    summary, removed = metrics.summarize(before), stats.removed(after.forward_kl, before.forward_kl)
    if removed.high < 0:
        job.reporter.note(
            f"warning: the student is farther from the teacher than before training, KL {summary.forward_kl.value:.4f} "
            f"→ {described.distribution.forward_kl.value:.4f}; lower distill.lr"
        )
    training = Training(variant.name, job.preset.distill, outcome.kept_step, summary, removed)
    write_student(job, variant.final, student, described, after, training)
    return Trained(outcome, summary, described.distribution, removed)


def _finish_variant(job: Job, variant: VariantDir, trained: Trained, stores: Stores, name: str) -> DistillReport:
    """Verify ``final/`` and move it in, then write ``distill.json``."""
    accept_student(job, variant.final)
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
        before=trained.before,
        after=trained.after,
        removed=trained.removed,
        final_loss=lines[-1][f"train/{objective_of(settings).name}"],
        steps=trained.outcome.steps,
        kept_step=trained.outcome.kept_step,
        stopped=trained.outcome.stopped,
        train_seconds_s=sum(step_seconds),
        step_seconds_median_s=median(step_seconds),
        completion_tokens_trained=int(sum(line["train/completion_tokens"] for line in lines)),
        versions=versions(),
        **grid_record(job.preset.quantize),
    )
    write_record(variant.report, report)
    return report
