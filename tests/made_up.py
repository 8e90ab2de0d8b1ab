"""Run folders without models: results, items and held-out documents that a test makes up."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdctl.config.preset import DistillSection
from kdctl.config.resolve import load_preset
from kdctl.run.documents import rolling_value
from kdctl.run.measures import ROLLING_MEASURES
from kdctl.run.paths import RunDir
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import (
    DistillReport,
    DistributionMetrics,
    Estimate,
    EvalResult,
    LayerError,
    MethodResult,
    QuantizeReport,
    SamplingRecord,
    StoreManifest,
    TaskScore,
    TextMetrics,
    Versions,
)

VERSIONS = Versions(kdctl="0", torch="0", transformers="0", compressed_tensors="0")
TEACHER = "t" * 64
GRID: dict[str, Any] = {
    "identity": "a" * 16,
    "teacher": TEACHER,
    "bits": 4,
    "group_size": 32,
    "symmetric": False,
    "method": "hqq",
}
DOCUMENTS = 40
ITEMS = 200


def known(estimate: Estimate | None) -> Estimate:
    """Return an estimate that a record has to have."""
    assert estimate is not None
    return estimate


def around(value: float) -> Estimate:
    """Put ten percent around a number."""
    return Estimate(value=value, low=value * 0.9, high=value * 1.1)


def distribution(kl: float, perplexity: float = 10.0) -> DistributionMetrics:
    """Make up held-out figures."""
    return DistributionMetrics(
        forward_kl=around(kl),
        reverse_kl=around(2 * kl),
        top1_agreement=around(0.5),
        perplexity=around(perplexity),
        teacher_perplexity=9.0,
        documents=DOCUMENTS,
        tokens=100,
    )


def text(perplexity: float = 20.0) -> TextMetrics:
    """Make up plain-text figures."""
    return TextMetrics(perplexity=around(perplexity), tokens=100, documents=4)


def answers(share: float, seed: int = 0, items: int = ITEMS) -> np.ndarray:
    """Draw right and wrong answers; the same items are the easy ones for every share and seed."""
    ease = np.random.default_rng(1).random(items)
    return ease + np.random.default_rng(seed).normal(0, 0.02, items) < share


def flipped(correct: np.ndarray, harmful: int, beneficial: int) -> np.ndarray:
    """Turn some right answers wrong and some wrong ones right."""
    changed = correct.copy()
    changed[np.flatnonzero(correct)[:harmful]] = False
    changed[np.flatnonzero(~correct)[:beneficial]] = True
    return changed


def write_items(folder: Path, task: str, correct: np.ndarray, prompt: str = "", subjects: int = 1) -> None:
    """Write ``samples/<task>.parquet``."""
    count = len(correct)
    table = pa.table(
        {
            "item_id": [f"{task}{prompt}{index:06d}" for index in range(count)],
            "subtask": [f"{task}_{index % subjects}" for index in range(count)],
            "cluster": [f"{task}_{index % subjects}" for index in range(count)],
            "doc_index": pa.array(range(count), pa.int32()),
            "acc": correct.astype(bool),
            "acc_norm": correct.astype(bool),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{task}.parquet")


def write_documents(path: Path, kl: float, documents: int = DOCUMENTS) -> None:
    """Write ``heldout.parquet`` of a model that is ``kl`` nats a token away from the teacher, more or less."""
    drawn = np.random.default_rng(2)
    tokens = drawn.integers(20, 100, documents).astype(float)
    teacher_nll = 2.0 * tokens * drawn.uniform(0.8, 1.2, documents)
    forward = kl * tokens * drawn.uniform(0.7, 1.3, documents)
    columns = {"tokens": tokens, "forward_kl": forward, "reverse_kl": 1.1 * forward, "agree": 0.7 * tokens}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | {"nll": teacher_nll + forward, "teacher_nll": teacher_nll}), path)


def evaluated(
    run: RunDir, model: str, tasks: Mapping[str, np.ndarray], kl: float = 0.1, subjects: int = 1, **fields: Any
) -> None:
    """Write a model's results.json and its items; ``fields`` replace those of the result or, in TASK_FIELDS, a task's.

    ``items=False`` leaves the per-item tables out, as an evaluation from before there were any.
    """
    kept, prompt = fields.pop("items", True), fields.pop("prompt", "")
    own = {name: fields.pop(name) for name in ("version", "num_fewshot") if name in fields}
    scores = {}
    for name, correct in tasks.items():
        value, count = float(correct.mean()), len(correct)
        error = float(np.sqrt(value * (1 - value) / max(1, count - 1)))
        plain: dict[str, Any] = {"version": "1", "metric": "acc", "num_fewshot": 0, "metrics": {"acc": value}}
        scores[name] = TaskScore(value=value, stderr=error, items=count, **(plain | own))
        if kept:
            write_items(run.eval(model) / "samples", name, correct, prompt, subjects)
    if kept:
        write_documents(run.eval(model) / "samples" / "heldout.parquet", kl, fields.pop("documents", DOCUMENTS))
    values: dict[str, Any] = {
        "model": model,
        "identity": "b" * 16,
        "weights": TEACHER if model == "teacher" else f"{model} weights",
        "limit": None,
        "tasks": scores,
        "distribution": distribution(kl),
        "text": text(),
        "size_bytes": 2**20,
        "seconds_s": 1.0,
        "versions": VERSIONS,
    }
    write_record(run.eval(model) / "results.json", EvalResult.model_validate(values | fields))


def rolled(
    run: RunDir,
    model: str,
    shift: float,
    task: str = "pages",
    prompt: str = "",
    noise: int = 0,
    documents: int = DOCUMENTS,
) -> None:
    """Add a task over whole documents to an evaluated model: 3 nats and ``shift`` more for each byte, more or less."""
    drawn, own = np.random.default_rng(3), np.random.default_rng(noise)
    sizes = drawn.integers(50, 400, documents)
    costs = 3.0 * drawn.uniform(0.7, 1.3, documents) + shift * own.uniform(0.5, 1.5, documents)
    names = [f"{task}{prompt}{index:06d}" for index in range(documents)]
    table = pa.table(
        {
            "item_id": names[::-1],  # in no order
            "subtask": [task] * documents,
            "cluster": [task] * documents,
            "doc_index": pa.array(range(documents), pa.int32()),
            "loglikelihood": -costs * sizes,
            "bytes": sizes,
            "words": sizes // 5,
        }
    )
    folder = run.eval(model) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{task}.parquet")
    metrics = {name: rolling_value(table, measure) for name, measure in ROLLING_MEASURES.items()}
    value, result = metrics["bits_per_byte"], read_record(run.eval(model) / "results.json", EvalResult)
    score = TaskScore(
        version="1", metric="bits_per_byte", value=value, stderr=0.1, items=documents, num_fewshot=0, metrics=metrics
    )
    update = {"tasks": result.tasks | {task: score}}
    write_record(run.eval(model) / "results.json", result.model_copy(update=update))


def quantized(folder: Path, kl: float, **fields: Any) -> None:
    """Write a student folder's quantize.json and held-out documents."""
    values = GRID | {
        "skip": (),
        "teacher_bytes": 4 * 2**20,
        "student_bytes": 3 * 2**20,
        "quantized_parameters": 10,
        "other_parameters": 5,
        "layers": (LayerError(name="layer", relative_error=0.1, sqnr_db=20.0),),
        "yardstick": "y",
        "distribution": distribution(kl),
        "text": text(),
        "teacher_text": text(),
        "seconds_s": 1.0,
        "versions": VERSIONS,
    }
    write_record(folder / "quantize.json", QuantizeReport.model_validate(values | fields))
    write_documents(folder / "heldout.parquet", kl)


def distilled(run: RunDir, name: str, kl: float, student: str = "ptq weights", **settings: Any) -> None:
    """Write a finished variant: distill.json, final/quantize.json and metrics.jsonl; ``settings`` of the training."""
    variant, section = run.variant(name), DistillSection.model_validate(settings)
    quantized(variant.final, kl)
    lines = [f'{{"step": {step}, "train/forward_kl": {1 / step}}}\n' for step in range(1, section.steps + 1)]
    variant.metrics.write_text("".join(lines))
    record = DistillReport(
        **GRID,
        variant=name,
        settings=section.model_dump(),
        student=student,
        stores={},
        before=distribution(0.2),
        after=distribution(kl),
        removed=around(0.5),
        final_loss=1 / section.steps,
        steps=section.steps,
        train_seconds_s=1.0,
        step_seconds_median_s=1.0,
        completion_tokens_trained=10,
        versions=VERSIONS,
    )
    write_record(variant.report, record)


def wrote_rollouts(folder: Path, max_new_tokens: int) -> None:
    """Write the manifest of a rollout store."""
    sampling = SamplingRecord(
        temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=max_new_tokens, seed=0
    )
    manifest = StoreManifest(source="student", identity="c" * 16, writer="w", sampling=sampling, shards=())
    write_record(folder / "manifest.json", manifest)


def make_run(path: Path, variants: Mapping[str, Mapping[str, Any]], tasks: Sequence[str] = ("alpha", "beta")) -> RunDir:
    """Make a folder with teacher (80 % right), PTQ student (60 %, KL 0.4) and variants, all evaluated.

    A variant is a mapping of distill settings, and of ``share`` right, ``draw`` of its answers and ``kl`` of its own.
    """
    run = RunDir(path)
    write_record(run.preset, load_preset("smoke"))
    evaluated(run, "teacher", {task: answers(0.8) for task in tasks}, kl=0.0)
    quantized(run.student, 0.4)
    evaluated(run, "ptq", {task: answers(0.6, 1) for task in tasks}, kl=0.4)
    for name, settings in variants.items():
        own = dict(settings)
        share, draw, kl = own.pop("share", 0.7), own.pop("draw", 2), own.pop("kl", 0.2)
        distilled(run, name, kl, **own)
        evaluated(run, name, {task: answers(share, draw) for task in tasks}, kl=kl, settings=own)
    return run


def edit(path: Path, **changes: Any) -> None:
    """Change top-level values of a record, as someone does who leaves out the hash of its text."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "sum"}))


def compared(run: RunDir, method: str, seconds: float) -> None:
    """Write what ``kdctl quantize --compare`` leaves, with the student's own figures."""
    made = read_record(run.student / "quantize.json", QuantizeReport).model_dump()
    fields = {name: made[name] for name in MethodResult.model_fields if name in made}
    write_record(
        run.compared(method), MethodResult(**fields | {"method": method, "seconds_s": seconds, "sqnr_db": 0.0})
    )
