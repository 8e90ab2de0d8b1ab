"""Rollout stores of a run: which ones a preset needs, and how they are filled."""

from collections.abc import Iterable

from kdctl.base.errors import DataError
from kdctl.config.preset import Preset, Source
from kdctl.config.resolve import identity
from kdctl.data.prompts import PromptSet, as_rollout
from kdctl.formats.student import load_student
from kdctl.rollout.fill import Plan, fill, fill_from_dataset, usable
from kdctl.rollout.store import RolloutStore
from kdctl.rollout.teacher_states import TeacherStates
from kdctl.run.records import Rollout
from kdctl.stages.context import Job

Stores = dict[Source, RolloutStore]


def needed_sources(preset: Preset) -> list[Source]:
    """List the stores that the preset's λ and off-policy source read."""
    return list(preset.distill.stores)


def filled(job: Job, source: Source) -> RolloutStore:
    """Return a finished store, filling it first where it is missing."""
    store = RolloutStore(job.run.rollouts(source))
    if not store.manifest_path.exists():
        job.reporter.note(f"no {source} rollouts yet: making them first")
    fill_source(job, source, store)
    return store


def fill_source(job: Job, source: Source, store: RolloutStore) -> bool:
    """Fill a store unless it is complete; tell whether anything was done. A student must be there to write its own."""
    settings, prompts = job.preset.rollout, job.train_prompts(answers=source == "dataset")
    writer = {
        "student": lambda: job.student_fingerprint,
        "teacher": lambda: job.fingerprint,
        "dataset": prompts.fingerprint,
    }[source]()
    inputs = {"writer": writer, "prompts": prompts.fingerprint(), "source": source}
    name = identity("rollout", {"rollout": settings.model_dump(exclude={"keep_states"})}, inputs)
    plan = Plan(source, name, writer, prompts, settings.prompts_per_block, settings.num_generations)
    if job.processes.on_main(lambda: usable(store, name)):
        return False
    if source == "dataset":
        job.on_main(lambda: fill_from_dataset(store, plan, dataset_rollouts(job, prompts)))
    else:
        model = job.teacher if source == "teacher" else load_student(job.run.student, job.device).model
        fill(store, plan, job.generator(model, source), job.reporter, job.processes)
    return True


def teacher_states(job: Job, stores: Iterable[RolloutStore]) -> TeacherStates | None:
    """Return the teacher's states of finished stores, made where they are missing; None where none are kept."""
    kept = job.preset.rollout.keep_states
    if kept == "no":
        return None
    states = TeacherStates(job.fingerprint, kept)
    for store in stores:
        states.fill(store, job.teacher, job.reporter, job.processes)
    return states


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
