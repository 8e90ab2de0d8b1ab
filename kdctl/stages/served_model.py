"""A model that a server serves, measured beside one that is here: by the tokens that the server is sent and writes."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdctl.base.errors import PresetError
from kdctl.config.preset import RolloutSection, server_url
from kdctl.config.resolve import identity
from kdctl.eval import distribution
from kdctl.rollout.server.pool import Pool
from kdctl.rollout.server.stranger import Stranger
from kdctl.rollout.work import Work
from kdctl.run.documents import Array, PerDocument, as_table, write_items
from kdctl.run.files import remove
from kdctl.run.measures import FORWARD_KL, PERPLEXITY, TEACHER_PERPLEXITY
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import EvalResult, Rollout
from kdctl.stages.context import Context, versions
from kdctl.stages.yardstick import Measuring

if TYPE_CHECKING:
    import pyarrow as pa

    from kdctl.eval.tasks import LoadedTask
    from kdctl.run.records import TaskScore

SCHEMES = ("http://", "https://")


@dataclass(frozen=True)
class Address:
    """A server and the name of its row."""

    name: str
    url: str


def is_address(reference: str) -> bool:
    """Tell whether a model is named by a server's address; one without its beginning is meant so where no file is."""
    bare = re.fullmatch(r"[\w.-]+:\d+/?", reference) is not None and not Path(reference).exists()
    return bare or reference.lower().startswith(SCHEMES)


def address_of(reference: str) -> str:
    """Return a server's address as it is kept. Raises PresetError where it is none, or has a secret in it."""
    try:
        return server_url(reference)
    except ValueError as error:
        raise PresetError(str(error)) from None


def check_first(reference: str) -> None:
    """Raise PresetError where what others are measured against is a server."""
    if is_address(reference):
        raise PresetError(
            f"{reference} stands first, and others are measured against the first, whose whole distribution that "
            "takes: no server states it; put a folder, Hub id or GGUF file first"
        )


def check_served(one: Address, tasks: "Mapping[str, LoadedTask]", settings: RolloutSection, *, by_layer: bool) -> None:
    """Raise, before anything is measured, where no server answers, or for what none can be asked for."""
    if by_layer:
        raise PresetError(f"{one.url} has no layers that could stand in others' place; leave --by-layer out")
    Pool([one.url], 1, settings.timeout_s, lambda _: None).meet()
    if tasks:
        from kdctl.eval.served import check_servable

        check_servable(tasks)


def measure_served(
    context: Context, measuring: Measuring, one: Address, tasks: "Mapping[str, LoadedTask]"
) -> EvalResult:
    """Measure what a server serves, anew each time, and write its results as of any other model.

    Held-out completions were drawn from the teacher p at temperature 1, so the mean of log p − log q of their tokens
    estimates KL(p‖q) without bias, though a server states no more of q than that. Raises ServerError as ``Stranger``.
    """
    started, teacher = time.perf_counter(), measuring.teacher
    held = distribution.by_length(measuring.completions())
    settings = context.preset.rollout.model_copy(update={"url": (one.url,)})
    server = Stranger(Work(teacher.load(), teacher.stop_ids(), "server", settings, reporter=context.reporter))
    texts = [distribution.text_rollout(ids) for ids in measuring.text()]
    server.meet([*held, *texts])
    said = _scored(context, server, held, f"{one.name} scores completions")
    server.check(held, said)
    distance = _against_teacher(measuring, _sums(said, held))
    text = _on_text(texts, _scored(context, server, texts, f"{one.name} scores plain text"))
    scores, items = _answers(context, measuring, server, one, tasks) if tasks else ({}, {})
    folder = context.paths.eval(one.name)
    remove(context.paths.results(one.name))  # they are not of the items that are written now
    tables = {"heldout": as_table(distance, distribution.prompt_ids(held)), "text": as_table(text)}
    result = EvalResult(
        model=one.name,
        identity=_identity(context, measuring, one.url),
        weights=f"served by {one.url}",
        limit=context.preset.eval.limit,
        tasks=scores,
        samples=write_items(folder, items | tables),
        distribution=distribution.summarize(distance),
        text=distribution.text_metrics(text),
        size_bytes=None,
        seconds_s=time.perf_counter() - started,
        versions=versions(),
        reference=one.url,
        served=server.described,
    )
    write_record(context.paths.results(one.name), result)
    return result


def _identity(context: Context, measuring: Measuring, url: str) -> str:
    """Hash what a measurement of a server reads, but for its weights."""
    inputs = {"teacher": measuring.teacher.fingerprint(), "heldout": measuring.store.fingerprint()}
    return identity("served", {"eval": context.preset.eval.decisive(), "url": url}, inputs)


def check_unnamed(context: Context, measuring: Measuring, named: Sequence[Address]) -> None:
    """Raise PresetError where the folder has rows of other servers that could not stand beside what is measured now."""
    names = {one.name for one in named}
    for path in context.paths.evaluated():
        found = read_record(path, EvalResult)
        other = found.served is not None and found.model not in names
        if other and found.identity != _identity(context, measuring, found.reference or ""):
            raise PresetError(
                f"{context.paths.path} has results of {found.reference} on other tasks, settings or text, and a server "
                "that is not named is not measured again; name it too, or use another --run"
            )


def _answers(
    context: Context, measuring: Measuring, server: Stranger, one: Address, tasks: "Mapping[str, LoadedTask]"
) -> "tuple[dict[str, TaskScore], dict[str, pa.Table]]":
    """Have the server answer tasks."""
    from kdctl.eval.served import ServedModel  # lm-eval takes seconds to import
    from kdctl.eval.tasks import score_shown

    teacher, settings = measuring.teacher, context.preset.eval
    with context.reporter.task(f"evaluating {one.name}", "documents") as advance:
        shown = ServedModel(teacher.load(), teacher.tokenizer(), server, settings)
        return score_shown(shown, tasks, settings, lambda _, done, total: advance(done, total))


def _against_teacher(measuring: Measuring, own: Array) -> PerDocument:
    """Compare −log likelihoods of held-out completions with the teacher's."""
    teachers = distribution.compare_teacher(measuring.yardstick(), [PERPLEXITY])
    differences = {FORWARD_KL: own - teachers[PERPLEXITY], PERPLEXITY: own, TEACHER_PERPLEXITY: teachers[PERPLEXITY]}
    return PerDocument(teachers.tokens, {one.column: sums for one, sums in differences.items()})


def _on_text(texts: Sequence[Rollout], said: Sequence[float]) -> PerDocument:
    """Sum −log likelihoods of plain text, each document from its second token on."""
    tokens = np.array([float(len(one.completion_ids)) for one in texts])
    return PerDocument(tokens, {PERPLEXITY.column: _sums(said, texts)})


def _scored(context: Context, server: Stranger, rows: Sequence[Rollout], label: str) -> list[float]:
    """Return what the server says of the tokens of completions, end to end."""
    total, done = sum(len(row.completion_ids) for row in rows), 0
    with context.reporter.task(label, "tokens") as advance:

        def told(tokens: int) -> None:
            nonlocal done
            advance(done := done + tokens, total)

        return server.score(rows, told)


def _sums(said: Sequence[float], rows: Sequence[Rollout]) -> Array:
    """Return −log likelihood of each completion, (documents,) float64."""
    ends = np.cumsum([len(row.completion_ids) for row in rows])
    return -np.array([part.sum() for part in np.split(np.array(said, np.float64), ends[:-1])])
