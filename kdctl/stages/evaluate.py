"""Benchmarks and distances of every model of a run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kdctl.base.errors import DataError, PresetError
from kdctl.config.resolve import identity
from kdctl.eval import distribution as metrics
from kdctl.eval.distribution import PerDocument
from kdctl.formats.student import load_student
from kdctl.model.external import Foreign, check_comparable, find_foreign, load_foreign
from kdctl.model.folder import fingerprint, weights_bytes
from kdctl.run.paths import read_record, write_record
from kdctl.run.records import DistillReport, EvalResult, Rollout
from kdctl.stages.context import Job, versions
from kdctl.stages.distill import check_name
from kdctl.stages.quantize import ensure_student

Sums = tuple[PerDocument, Sequence[str]]
"""What was measured on each document, and the documents' prompts."""


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate. foreign: where it came from, if kdctl did not make it here."""

    name: str
    folder: Path
    foreign: Foreign | None = None

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the weights, hashed once."""
        return fingerprint(self.folder)


def evaluate(
    job: Job, names: Sequence[str] = (), force: bool = False, also: Foreign | None = None
) -> dict[str, EvalResult]:
    """Evaluate teacher, PTQ student and every variant, or only those named, and ``also`` a model made elsewhere.

    Tasks are loaded before any model. Processes divide the models.
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
        from kdctl.eval.tasks import build_tasks  # lm-eval takes seconds to import; only this stage needs it

        tasks = job.processes.main_first(lambda: build_tasks(job.preset.eval, job.offline))
        ensure_student(job)
        _ = job.heldout_store
        with job.alone() as everyone:
            for one in everyone.share(pending):
                _evaluate_one(job, one, tasks)
    job.processes.wait()
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
        "weights": one.weights,
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
    from kdctl.eval.tasks import score_tasks, write_items

    started, folder = time.perf_counter(), job.run.eval(one.name)
    model = _load(job, one)
    with job.reporter.task(f"evaluating {one.name}", "documents") as advance:
        scores, items = score_tasks(
            model, job.tokenizer, tasks, job.preset.eval, lambda _, done, total: advance(done, total)
        )
    found = _distances(job, one, model)
    write_items(folder, items | {name: metrics.as_table(sums, prompts) for name, (sums, prompts) in found.items()})
    summary = {name: metrics.summarize(sums) for name, (sums, _) in found.items()}
    report = job.run.variant(one.name).report
    result = EvalResult(
        model=one.name,
        identity=_eval_identity(job, one),
        weights=one.weights,
        limit=job.preset.eval.limit,
        tasks=scores,
        distribution=summary["heldout"],
        student_written=summary.get("student_written"),
        text=metrics.text_metrics(found["text"][0]),
        text_distribution=summary["text"],
        size_bytes=weights_bytes(one.folder),
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


def _distances(job: Job, one: Candidate, model: PreTrainedModel) -> dict[str, Sums]:
    """Compare a model with the teacher on teacher-written completions, on its own, and on plain text."""
    held, settings = job.heldout_store.read(), job.preset.eval
    found: dict[str, Sums] = {"heldout": (_on_yardstick(job, one, model), _prompt_ids(held))}
    if settings.student_written and one.name == "teacher":
        found["student_written"] = found["heldout"]
    elif settings.student_written:
        store = job.student_written(model, one.weights, job.run.eval(one.name) / "rollouts")
        own = store.read()
        found["student_written"] = (job.measure(model, one.name, job.yardstick_of(own)), _prompt_ids(own))
    return found | {"text": (metrics.compare(model, job.text_yardstick), ())}


def _on_yardstick(job: Job, one: Candidate, model: PreTrainedModel) -> PerDocument:
    """Measure a model on the yardstick, or read what was measured when it was made."""
    if one.name == "teacher":
        return metrics.compare_teacher(job.yardstick)
    written = None if one.foreign else job.measured(one.folder)
    return job.measure(model, one.name) if written is None else written


def _prompt_ids(rollouts: Sequence[Rollout]) -> list[str]:
    """List the prompts of a table's rows."""
    return [rollout.prompt_id for rollout in metrics.by_length(rollouts)]
