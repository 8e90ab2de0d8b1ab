"""Rollout stores of a run: which ones a preset needs, and how they are filled."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from transformers import PreTrainedModel

from kdctl.base.errors import DataError
from kdctl.config.preset import Preset, Source
from kdctl.config.resolve import identity
from kdctl.data.prompts import PromptSet, as_rollout
from kdctl.formats.student import check_sums, load_student_model
from kdctl.model.context import check_completions
from kdctl.model.folder import fingerprint
from kdctl.model.teacher import Teacher
from kdctl.rollout.engine import engine_named
from kdctl.rollout.fill import Plan, fill, fill_from_dataset, usable
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.store import RolloutStore
from kdctl.rollout.teacher_states import TeacherStates
from kdctl.rollout.work import RolloutEngine, WeightFiles, Work
from kdctl.run.files import remove
from kdctl.run.records import Prompt, Rollout
from kdctl.stages.context import Context
from kdctl.stages.served import StudentFiles, TeacherFiles
from kdctl.stages.yardstick import heldout_prompts, prompt_reader

Stores = dict[Source, RolloutStore]


def store_of(context: Context, source: Source) -> RolloutStore:
    """Return the store of a source and of the preset's mix of prompts."""
    return RolloutStore(context.paths.rollouts(source, context.preset.prompts.mix))


def unmixed(context: Context) -> Context:
    """Return the same with the weights of its sources themselves, on which the PTQ student is calibrated."""
    if context.preset.prompts.mix is None:
        return context
    prompts = context.preset.prompts.model_copy(update={"mix": None})
    return replace(context, preset=context.preset.model_copy(update={"prompts": prompts}))


def needed_sources(preset: Preset) -> list[Source]:
    """List the stores that the preset's λ and off-policy source read."""
    return list(preset.distill.stores)


def read_prompts(context: Context, teacher: Teacher, answers: bool = False) -> PromptSet:
    """Read the training prompts; none of them is a held-out one.

    Raises PresetError if one exceeds the teacher's context together with its completion, or with a token of its answer.
    """
    settings = context.preset.rollout
    excluded = frozenset(prompt.id for prompt in heldout_prompts(context, teacher).prompts)
    found = prompt_reader(context, teacher).train(settings.num_prompts, settings.seed, answers, excluded)
    longest = 1 if answers else settings.max_new_tokens
    check_completions(teacher.reach(), found.longest, longest, "rollout.max_new_tokens")
    return found


def check_prompt_lengths(context: Context, teacher: Teacher) -> None:
    """Read all prompts that a run needs, so that those beyond the teacher's context are refused before any work."""
    settings = context.preset.distill
    for source in (*settings.stores, *(["student"] if settings.live else [])):
        read_prompts(context, teacher, answers=source == "dataset")


def train_prompts(context: Context, teacher: Teacher, answers: bool = False) -> PromptSet:
    """Read the training prompts, and say what is missing."""
    settings, longest = context.preset.rollout, context.preset.prompts.max_prompt_tokens
    found = read_prompts(context, teacher, answers)
    if found.skipped:
        context.reporter.note(f"{found.skipped} prompts longer than {longest} tokens left out")
    if len(found.prompts) < settings.num_prompts:
        short = ", ".join(f"{name} has {count} too few" for name, count in found.missing.items())
        why = f": {short}, so that its share is smaller than its weight says" if short else ""
        context.reporter.note(f"only {len(found.prompts)} prompts for rollout.num_prompts={settings.num_prompts}{why}")
    return found


def engine_of(
    context: Context,
    teacher: Teacher,
    model: PreTrainedModel,
    source: Source,
    prompts: Sequence[Prompt],
    name: str,
    files: WeightFiles | None = None,
) -> RolloutEngine:
    """Make the engine that the preset names, to complete prompts with a model whose weights ``files`` has.

    name: what its caches go by, another one for other weights.
    """
    settings, served = context.preset.rollout, context.paths.served
    if files is None:
        teachers = TeacherFiles(teacher, served / "server.log")
        files = teachers if source == "teacher" else StudentFiles(context, served)
    work = Work(model, teacher.stop_ids(), source, settings, prompts, files, name, context.reporter, context.ranks)
    return engine_named(settings.engine)(work)


def ensure_rollouts(context: Context, teacher: Teacher, source: Source) -> RolloutStore:
    """Return a finished store, filling it first where it is missing."""
    store = store_of(context, source)
    fill_source(context, teacher, source, store, why=f"no {source} rollouts yet: making them first")
    return store


def fill_source(
    context: Context,
    teacher: Teacher,
    source: Source,
    store: RolloutStore,
    *,
    force: bool = False,
    named: bool = False,
    why: str = "",
) -> bool:
    """Fill a store unless it is complete; tell whether anything was done. A student must be there to write its own.

    force: write it anew; named: the user asked for this source, so that a server holds what writes it; why: said where
    it is filled.
    """
    context = context if named or source == "student" else in_process(context)
    plan = plan_of(context, teacher, source)
    if not force and is_usable(context, store, plan):
        return False
    with context.claimed(f"rollouts/{source}"):
        if force:
            context.on_main(lambda _: remove(store.path))
        elif is_usable(context, store, plan):
            return False
        if why:
            context.reporter.note(why)
        _fill(context, teacher, source, store, plan)
    return True


def in_process(context: Context) -> Context:
    """Return the same with kdctl's own engine in place of a server, which holds the student."""
    settings = context.preset.rollout
    if settings.engine != "server":
        return context
    away = {"engine": "transformers", "url": (), "serve": None, "restart": None, "weights": None, "lag": 0}
    own = settings.model_copy(update=away)
    return replace(context, preset=context.preset.model_copy(update={"rollout": own}))


def is_usable(context: Context, store: RolloutStore, plan: Plan) -> bool:
    """Tell whether a store is complete. Raises StoreError, naming what differs, if it was made otherwise."""
    asked = {f"rollout.{name}": value for name, value in context.preset.rollout.model_dump().items()}
    return context.ranks.on_main(lambda: usable(store, plan.identity, asked))


def check_stores(context: Context, teacher: Teacher) -> None:
    """Raise StoreError, before anything is made, if a store that training reads is there and was made otherwise."""
    for source in needed_sources(context.preset):
        store = store_of(context, source)
        made = source != "student" or (context.paths.student / "quantize.json").exists()
        if source == "student" and made:
            context.on_main(lambda main: check_sums(main.paths.student))  # else its store would seem of another one
        if context.ranks.on_main(lambda store=store, made=made: store.finished and made):
            is_usable(context, store, plan_of(context, teacher, source))


def plan_of(context: Context, teacher: Teacher, source: Source) -> Plan:
    """Say what a store is to hold."""
    settings, prompts = context.preset.rollout, train_prompts(context, teacher, answers=source == "dataset")
    writer = {
        "student": lambda: fingerprint(context.paths.student),
        "teacher": teacher.fingerprint,
        "dataset": prompts.fingerprint,
    }[source]()
    inputs = {"writer": writer, "prompts": prompts.fingerprint(), "source": source, **teacher.new_stops()}
    # The teacher's completions are the same whichever server draws them, so training takes what is there.
    served = source == "teacher" and settings.engine == "server"
    left = ("keep_states", "lag", *(("engine",) if served else ()))
    decisive = {name: value for name, value in settings.decisive().items() if name not in left}
    name = identity("rollout", {"rollout": decisive}, inputs)
    return Plan(source, name, writer, prompts, settings.prompts_per_block, settings.num_generations)


def _fill(context: Context, teacher: Teacher, source: Source, store: RolloutStore, plan: Plan) -> None:
    """Write a store."""
    teacher.say_stops()
    if source == "dataset":
        context.on_main(lambda main: fill_from_dataset(store, plan, dataset_rollouts(main, teacher, plan.prompts)))
    else:
        model = _writer(context, teacher, source)
        try:
            with closing(engine_of(context, teacher, model, source, plan.prompts.prompts, plan.identity)) as engine:
                engine.load(model, 0)
                fill(store, plan, engine, Sampling.of(context.preset.rollout), context.reporter, context.ranks)
        finally:
            if context.ranks.is_main:
                StudentFiles(context.alone(), context.paths.served).clear()


def _writer(context: Context, teacher: Teacher, source: Source) -> PreTrainedModel:
    """Load the model that writes a store; the teacher is forgotten where the student does."""
    if source == "teacher":
        return teacher.load()
    teacher.forget()
    return load_student_model(context.paths.student, teacher.device)


def ensure_teacher_states(context: Context, teacher: Teacher, stores: Iterable[RolloutStore]) -> TeacherStates | None:
    """Return the teacher's states of finished stores, made where they are missing; None where none are kept."""
    kept = context.preset.rollout.keep_states
    if kept == "no":
        return None
    states = TeacherStates(teacher.fingerprint(), kept)
    for store in stores:
        with context.claimed(f"{store.path.relative_to(context.paths.path).as_posix()}/states"):
            states.fill(store, teacher.load(), context.reporter, context.ranks)
    return states


def examples(context: Context, teacher: Teacher, source: Source, count: int) -> list[tuple[str, str]]:
    """Decode the first prompts and completions of a store."""
    rollouts = store_of(context, source).read()[:count]
    decode = teacher.tokenizer().decode
    return [(str(decode(r.prompt_ids)), str(decode(r.completion_ids))) for r in rollouts]


def dataset_rollouts(context: Context, teacher: Teacher, prompts: PromptSet) -> Iterator[Rollout]:
    """Yield a data set's completions, cut at ``max_new_tokens`` and where the teacher's context ends.

    Raises DataError at the end if all are empty.
    """
    settings, stop, reach = context.preset.rollout, teacher.stop_ids(), teacher.reach()
    found = cut = 0
    for prompt in prompts.prompts:
        room = reach.room(len(prompt.prompt_ids), settings.max_new_tokens)
        rollout = as_rollout(prompt, settings.seed, room, stop)
        cut += rollout.finish_reason == "length" and len(prompt.completion_ids or ()) > room < settings.max_new_tokens
        if rollout.completion_ids:
            found += 1
            yield rollout
    if cut:
        context.reporter.note(f"{cut} answers cut at {reach.tokens} tokens with their prompts: {reach.why}")
    if not found:
        raise DataError(
            f"every answer in prompts.train={context.preset.prompts.train!r} is empty; there is nothing to learn"
        )
