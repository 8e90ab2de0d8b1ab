"""Training of one variant, from the PTQ student to ``final/``."""

import math
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from kdctl import stats
from kdctl.base import stopping
from kdctl.base.errors import PresetError, StoreError
from kdctl.config.preset import Preset
from kdctl.config.resolve import LONGEST_NAME, canonical, identity, variant_name
from kdctl.distill.feed import Feed, Live, Replay, ReplayedVariant
from kdctl.distill.fsdp import free_gathered, gathered, whole_rows
from kdctl.distill.loop import Outputs, Trainer, objective_of, train
from kdctl.distill.monitor import Outcome
from kdctl.distill.shadow import make_shadow
from kdctl.eval import distribution
from kdctl.formats.model_card import Training
from kdctl.formats.offsets import offsets_sum, with_offsets
from kdctl.formats.student import Student
from kdctl.model.activation_checkpointing import set_checkpointing
from kdctl.model.folder import fingerprint
from kdctl.model.teacher import Teacher
from kdctl.quant.methods import QUANTIZERS
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.store import RolloutStore
from kdctl.rollout.teacher_states import TeacherStates
from kdctl.run.documents import PerDocument
from kdctl.run.files import remove, sha256
from kdctl.run.measures import FORWARD_KL, fixed
from kdctl.run.paths import VariantDir
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import DistillReport, DistributionMetrics, Estimate, QuantizeReport
from kdctl.run.tracking import Tracker, Untracked, Watch, open_wandb, read_metrics
from kdctl.stages.context import Context, versions
from kdctl.stages.divided import closed, opened
from kdctl.stages.gate import check_gap
from kdctl.stages.publish import Described, publish_student
from kdctl.stages.quantize import describe_student, ensure_student, grid_record
from kdctl.stages.rollout import (
    Stores,
    check_prompt_lengths,
    check_stores,
    engine_of,
    ensure_rollouts,
    ensure_teacher_states,
    needed_sources,
    train_prompts,
)
from kdctl.stages.served import StudentFiles
from kdctl.stages.yardstick import Figures, Measuring, ensure_measuring, figures_of
from kdctl.system.memory import give_back


@dataclass(frozen=True)
class Plan:
    """What one variant is trained on. identity: hash of the settings and of everything that training reads."""

    variant: VariantDir
    stores: Stores
    identity: str


@dataclass(frozen=True)
class Trained:
    """How training ended, and what is said of the student that it left."""

    outcome: Outcome
    before: DistributionMetrics
    after: DistributionMetrics
    removed: Estimate


def check_name(name: str, option: str = "--name") -> str:
    """Return a model's name. Raises PresetError if it cannot be one: it names folders, beside teacher and ptq."""
    if not re.fullmatch(r"\w[\w.=+-]*", name) or name in ("teacher", "ptq") or len(name.encode()) > LONGEST_NAME:
        raise PresetError(
            f"{option} {name!r:.300} cannot name a variant; use letters, digits and ._=+-, {LONGEST_NAME} bytes at "
            "most, and neither teacher nor ptq"
        )
    return name


def distill(
    context: Context,
    teacher: Teacher,
    measuring: Measuring | None = None,
    *,
    name: str | None = None,
    force: bool = False,
    min_gap: float = 0.0,
    watch: Watch | None = None,
) -> DistillReport:
    """Train one variant and write its ``final/`` folder. ``watch`` is told of every step and may end it by raising.

    Raises TrainingError, before rollouts and training, unless the PTQ student's gap is surely ``min_gap`` nats a token.
    """
    context.ranks.check_trainable(context.preset.distill)
    context.preset.distill.check_rates()
    if not math.isfinite(min_gap):
        raise PresetError(f"--min-gap {min_gap} is no number of nats; leave it out to train in any case")
    variant = context.paths.variant(check_name(name) if name is not None else default_name(context))
    if context.preset.distill.replay is not None:
        recorded(context, context.preset.distill.replay)
    _check_mix(context, variant)
    check_stores(context, teacher)
    if context.preset.distill.off_policy_source in context.preset.distill.stores:
        check_prompt_lengths(context, teacher)
    ensure_student(context, teacher, measuring)
    measuring = measuring or ensure_measuring(context, teacher)
    if not force and context.ranks.on_main(variant.report.exists):
        return _finished(context, _plan(context, teacher, variant))
    before = measured_ptq(context, measuring)
    check_gap(context, teacher, before, min_gap)
    plan = _plan(context, teacher, variant)
    with context.claimed(f"distill/{variant.name}"):
        if force:
            context.on_main(lambda _: remove(variant.path))
        elif context.ranks.on_main(variant.report.exists):
            return _finished(context, plan)
        trained = _train(context, measuring, plan, before, watch)
        return context.on_main(lambda main: _finish_variant(main, teacher, plan, trained))


def _check_mix(context: Context, variant: VariantDir) -> None:
    """Raise StoreError, before rollouts are made, if a finished variant of the name was trained on another mix."""
    mix = context.preset.prompts.mix
    made = context.ranks.on_main(
        lambda: read_record(variant.report, DistillReport) if variant.report.exists() else None
    )
    if made is not None and made.mix != mix:
        raise StoreError(
            f"{variant.path} was trained with prompts.mix={made.mix}, and {mix} is asked for; --name keeps both, and "
            "--force redoes it"
        )


def default_name(context: Context) -> str:
    """Name a variant after the settings in which it differs from its run folder's own."""
    return variant_name(context.preset, read_record(context.paths.preset, Preset))


def made_of(context: Context) -> str:
    """Return the identity of the PTQ student: what it was made of."""
    return read_record(context.paths.student / "quantize.json", QuantizeReport).identity


def measured_ptq(context: Context, measuring: Measuring) -> PerDocument:
    """Return the PTQ student's distance from the teacher on the yardstick, which its folder states."""
    folder = context.paths.student
    stated = measuring.measured(folder)
    if stated is not None:
        return stated
    with opened(context, measuring) as (own, student):
        return context.ranks.on_models(lambda: own.measure(student.model, "PTQ student"))


def _finished(context: Context, plan: Plan) -> DistillReport:
    """Return a finished variant's report. Raises StoreError if it was trained with other settings or inputs."""
    found = read_record(plan.variant.report, DistillReport)
    if found.identity != plan.identity:
        asked = context.preset.distill.model_dump()
        pairs = {key: (canonical(old), canonical(asked.get(key, old))) for key, old in found.settings.items()}
        changed = [f"distill.{key}={old}, now {new}" for key, (old, new) in pairs.items() if old != new]
        raise StoreError(
            f"{plan.variant.path} was trained with other settings or from other inputs"
            f"{' (' + '; '.join(changed) + ')' if changed else ''}; --name keeps both, --force redoes it"
        )
    context.reporter.note(f"distill: {plan.variant.path} is complete, skipped")
    return found


def ensure_stores(context: Context, teacher: Teacher) -> Stores:
    """Return the stores that training reads, filled where they are missing."""
    return {source: ensure_rollouts(context, teacher, source) for source in needed_sources(context.preset)}


def _plan(context: Context, teacher: Teacher, variant: VariantDir) -> Plan:
    """Hash the distill section and what it reads; live generation reads the rollout section and prompts too."""
    preset, stores = context.preset, ensure_stores(context, teacher)
    sections: dict[str, Any] = {"distill": preset.distill.decisive()}
    inputs = {"student": fingerprint(context.paths.student), "teacher": teacher.fingerprint()}
    inputs |= {source: store.fingerprint() for source, store in stores.items()}
    if offsets := offsets_sum(context.paths.offsets, made_of(context)):
        inputs["offsets"] = offsets
    if preset.distill.live:
        sections["rollout"] = preset.rollout.decisive()
        inputs |= {"prompts": train_prompts(context, teacher).fingerprint(), **teacher.new_stops()}
    if preset.distill.replay is not None:
        inputs["replay"] = recorded(context, preset.distill.replay).fingerprint()
    if preset.rollout.keep_states != "no":
        sections["states"] = preset.rollout.keep_states
    return Plan(variant, stores, identity("distill", sections, inputs))


def _train(context: Context, measuring: Measuring, plan: Plan, before: PerDocument, watch: Watch | None) -> Trained:
    """Train the PTQ student and publish what it became."""
    outcome, figures, student = _train_opened(context, measuring, plan, watch)
    give_back()
    student.weights.update(whole_rows(list(student.weights.items()), context.ranks))
    return context.on_main(lambda main: _write_trained(main, measuring, plan, student, before, outcome, figures))


def _train_opened(
    context: Context, measuring: Measuring, plan: Plan, watch: Watch | None
) -> tuple[Outcome, Figures, Student]:
    """Train and measure with both models in memory; return what is left of the student to be written."""
    with opened(context, measuring) as (own, student):
        if context.preset.distill.train == "weights":
            _take_up_offsets(context, student)
        outcome = _run_loop(context, own, plan, student, watch)
        give_back()
        figures = context.ranks.on_models(lambda: figures_of(own, student.model, "distilled student"))
        return outcome, figures, closed(context, student)


def _take_up_offsets(context: Context, student: Student) -> None:
    """Tell a student's weights where masters start in their cells, where that is kept; say what its loss means."""
    student.weights.update(with_offsets(context.paths.offsets, student.weights, made_of(context), context.ranks.span))
    leaves = QUANTIZERS[context.preset.quantize.method].leaves_offsets
    if leaves and any(one.offsets is None for one in student.weights.values()):
        context.reporter.note(
            f"{context.paths.offsets} has no offsets of this student: masters start in the middle of their cells, and "
            "training removes less; kdctl quantize --force makes student and offsets again"
        )


def _run_loop(context: Context, measuring: Measuring, plan: Plan, student: Student, watch: Watch | None) -> Outcome:
    """Run the training loop, which leaves the student as it is to be kept."""
    settings, teacher = context.preset.distill, measuring.teacher
    files = StudentFiles(context, plan.variant.served)
    feed, states = _feed(context, teacher, plan, student, files)
    shadow = make_shadow(settings, student.model, student.weights, teacher.load())
    files.follow(shadow, student)
    student.weights.clear()  # a byte a weight that nothing reads until the new codes are taken
    set_checkpointing(student.model, context.preset.runtime.activation_checkpointing)
    trainer = Trainer(teacher.load(), student.model, shadow, feed, settings, states)
    small = measuring.yardstick(settings.heldout_documents)
    give_back()
    with closing(feed), context.reporter.task(f"distilling {plan.variant.name}", "steps") as advance:
        opened = _tracker(context, plan, watch)
        outputs = Outputs(plan.variant.checkpoints, opened, plan.identity, advance, context.reporter.note)
        with stopping.put_off():
            outcome = train(trainer, small, outputs)
    files.clear()
    student.weights.update(shadow.quantized())
    shadow.detach()
    free_gathered(student.model)
    return outcome


def _tracker(context: Context, plan: Plan, watch: Watch | None) -> Callable[[int], Tracker]:
    """Return what opens the variant's metrics, given the step that training resumes from."""

    def opened(resume_step: int) -> Tracker:
        if not context.ranks.is_main:
            return Untracked()
        config = {**context.preset.model_dump(mode="json"), "variant": plan.variant.name}
        run = open_wandb(context.preset.tracking, context.paths.path, plan.variant.name, config)
        return Tracker(plan.variant.metrics, resume_step, run, watch)

    return opened


def recorded(context: Context, name: str) -> RolloutStore:
    """Return the live rollouts of another variant. Raises StoreError if it has none."""
    store = RolloutStore(context.paths.variant(check_name(name, "distill.replay")).rollouts)
    if not store.manifest_path.exists():
        raise StoreError(
            f"distill.replay={name!r}: no live rollouts in {store.path}; name a finished variant that generated its own"
        )
    return store


def _feed(
    context: Context, teacher: Teacher, plan: Plan, ptq: Student, files: StudentFiles
) -> tuple[Feed, TeacherStates | None]:
    """Put together where each row of a step comes from, and the teacher's states of it where they are kept."""
    settings, stores, ranks = context.preset.distill, plan.stores, context.ranks
    off_policy = stores[settings.off_policy_source].read() if settings.lmbda < 1 else []
    if settings.replay is not None and settings.lmbda > 0:
        store = recorded(context, settings.replay)
        feed = Feed(settings, off_policy, ReplayedVariant(store.read(), settings.replay), ranks)
        return feed, ensure_teacher_states(context, teacher, [*stores.values(), store])
    states = ensure_teacher_states(context, teacher, stores.values())
    if settings.lmbda == 0:
        return Feed(settings, off_policy, None, ranks), states
    if not settings.live:
        return Feed(settings, off_policy, Replay(stores["student"].read(), settings.seed), ranks), states
    return Feed(settings, off_policy, _live(context, teacher, plan, ptq, states, files), ranks), states


def _live(
    context: Context, teacher: Teacher, plan: Plan, ptq: Student, states: TeacherStates | None, files: StudentFiles
) -> Live:
    """Generate during training into the variant's own store."""
    prompts, store = train_prompts(context, teacher).prompts, RolloutStore(plan.variant.rollouts)
    engine = engine_of(context, teacher, ptq.model, "student", prompts, f"{plan.variant.name}-{plan.identity}", files)
    sampling = Sampling.of(context.preset.rollout)
    live = Live(
        settings=context.preset.distill,
        prompts=prompts,
        student=ptq.model,
        engine=engine,
        sampling=sampling,
        store=store,
        identity=plan.identity,
        writer=fingerprint(context.paths.student),
        processes=context.ranks,
        lag=context.preset.rollout.lag,
    )
    if context.ranks.sharded and context.preset.rollout.engine == "transformers":
        live.whole = partial(gathered, ptq.model, context.ranks.freed)
    if states is not None:
        live.keep = lambda entry, rollouts: states.add(store, entry, rollouts, teacher.load(), context.ranks)
    return live


def _write_trained(
    context: Context,
    measuring: Measuring,
    plan: Plan,
    student: Student,
    before: PerDocument,
    outcome: Outcome,
    figures: Figures,
) -> Trained:
    """Publish the trained student as ``final/``."""
    after = figures.per_document
    described = describe_student(context, measuring, student, plan.identity, figures)
    summary, removed = distribution.summarize(before), stats.removed(after[FORWARD_KL], before[FORWARD_KL])
    if removed.high < 0:
        context.reporter.note(
            "warning: the student is farther from the teacher than before training, KL "
            f"{fixed(summary.forward_kl.value, 4)} → {fixed(described.distribution.forward_kl.value, 4)}; lower "
            "distill.lr"
        )
    training = Training(plan.variant.name, context.preset.distill, outcome.kept_step, summary, removed)
    said = Described(described, after, training)
    publish_student(context, measuring.teacher, plan.variant.final, student, said)
    return Trained(outcome, summary, described.distribution, removed)


def _finish_variant(context: Context, teacher: Teacher, plan: Plan, trained: Trained) -> DistillReport:
    """Write ``distill.json``, which says that the variant is complete."""
    settings, lines, stores = context.preset.distill, read_metrics(plan.variant.metrics), plan.stores
    if settings.live:
        stores = {**stores, "student": RolloutStore(plan.variant.rollouts)}
    step_seconds = [line["time/step_s"] for line in lines]
    report = DistillReport(
        identity=plan.identity,
        teacher=teacher.fingerprint(),
        variant=plan.variant.name,
        settings=settings.model_dump(),
        mix=context.preset.prompts.mix,
        student=fingerprint(context.paths.student),
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
        metrics=sha256(plan.variant.metrics),
        completion_tokens_trained=int(sum(line["train/completion_tokens"] for line in lines)),
        versions=versions(),
        **grid_record(context.preset.quantize),
    )
    write_record(plan.variant.report, report)
    return report
