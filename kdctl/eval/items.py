"""Per-item tables: what lm-eval logs about each document, as one Arrow row."""

import difflib
import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from lm_eval.api.task import ConfigurableTask

from kdctl.config.resolve import canonical
from kdctl.eval.answers import Written
from kdctl.run.documents import item_values
from kdctl.run.measures import (
    ACCURACY,
    BITS_PER_BYTE,
    NORMALIZED_ACCURACY,
    WORD_PERPLEXITY,
    Choices,
    ItemMeasure,
)

SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "subtask": pa.string(),
        "cluster": pa.string(),
        "item_id": pa.string(),
        "doc_index": pa.int32(),
        "gold": pa.int32(),
        "loglikelihoods": pa.list_(pa.float64()),
        "lengths": pa.list_(pa.int32()),
        "bytes": pa.list_(pa.int32()),
        "prediction_acc": pa.int32(),
        "prediction_acc_norm": pa.int32(),
        "acc": pa.bool_(),
        "acc_norm": pa.bool_(),
    }
)

SCORED = pa.schema(
    {
        "task": pa.string(),
        "subtask": pa.string(),
        "cluster": pa.string(),
        "item_id": pa.string(),
        "doc_index": pa.int32(),
        "score": pa.float64(),
        "scores": pa.list_(pa.float64()),
        "answers": pa.list_(pa.string()),
        "tokens": pa.list_(pa.int32()),
        "ended": pa.list_(pa.bool_()),
        "repetition": pa.list_(pa.float64()),
    }
)
"""Items that are no multiple choice; the lists have one entry for each answer, and none where nothing is written."""

WHOLE = pa.schema(
    {
        "task": pa.string(),
        "subtask": pa.string(),
        "cluster": pa.string(),
        "item_id": pa.string(),
        "doc_index": pa.int32(),
        "loglikelihood": pa.float64(),
        "bytes": pa.int64(),
        "words": pa.int64(),
    }
)
"""Whole documents, as lm-eval counts their bytes and words."""

Sample = Mapping[str, Any]
ROLLING = "loglikelihood_rolling"
TWINS = 0.7
"""Share of common words from which on neighbours with the same options are twins: WinoGrande's share 0.76 or more."""


@dataclass(frozen=True)
class Repeat:
    """One answer to every item of a task: what each is worth, and how it was written where it was."""

    scores: list[float]
    written: list[Written]


@dataclass(frozen=True)
class Run:
    """lm-eval's account of one task: its log of every document, and its metrics by name.

    repeats: of a task that is no multiple choice, one for each answer to its items.
    """

    name: str
    task: ConfigurableTask
    samples: list[Sample]
    metrics: dict[str, float]
    repeats: list[Repeat] = field(default_factory=list)


def items_table(name: str, runs: Sequence[Run]) -> pa.Table:
    """Make the table of a task or group from the runs of its subtasks, one row a document.

    ``subtask`` is the document's subject where it has one (MMLU), else the lm-eval task. Items of one ``cluster`` are
    not independent.
    """
    rows, schema = [row for run in runs for row in _rows(run)], _schema(runs[0])
    ids = item_ids(row.pop("requests") for row in rows)
    return pa.Table.from_pylist(
        [{"task": name, "item_id": item_id, **row} for item_id, row in zip(ids, rows, strict=True)], schema
    )


def _schema(run: Run) -> pa.Schema:
    if run.task.OUTPUT_TYPE == ROLLING:
        return WHOLE
    return SCORED if run.repeats else SCHEMA


def item_ids(requests: Iterable[str]) -> Iterator[str]:
    """Hash each item's requests to 16 hex digits; a later copy of the same item (MMLU has some) gets its own."""
    seen = Counter()
    for text in requests:
        copy = f"#{seen[text]}" if seen[text] else ""
        seen[text] += 1
        yield hashlib.sha256((text + copy).encode()).hexdigest()[:16]


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    """Turn each logged document into a row."""
    clusters = cluster_labels(run.name, [sample["doc"] for sample in run.samples])
    for place, (sample, cluster) in enumerate(zip(run.samples, clusters, strict=True)):
        doc = sample["doc"]
        asked = [arguments[:2] if len(arguments) > 1 else ("", *arguments) for arguments in sample["arguments"]]
        contexts, continuations = zip(*asked, strict=True)
        yield {
            "subtask": str(doc.get("subject", run.name)),
            "cluster": cluster,
            "requests": canonical({"context": contexts, "choices": continuations}),
            "doc_index": sample["doc_id"],
            **_found(run, place),
        }


def _found(run: Run, place: int) -> dict[str, Any]:
    """Say what the model made of a document, by the kind of task."""
    if run.task.OUTPUT_TYPE == ROLLING:
        return _whole(run.samples[place])
    return _scored(run, place) if run.repeats else _verdict(run.task, run.samples[place])


def _whole(sample: Sample) -> dict[str, Any]:
    """Say how likely a whole document is, and how lm-eval counts its bytes and, where the task has them, its words."""
    loglikelihood, size = sample[BITS_PER_BYTE.name]
    words = sample[WORD_PERPLEXITY.name][1] if WORD_PERPLEXITY.name in sample else None
    return {"loglikelihood": loglikelihood, "bytes": size, "words": words}


def _scored(run: Run, place: int) -> dict[str, Any]:
    """Say what the answers to a document are worth and how they were written."""
    written = [repeat.written[place] for repeat in run.repeats if repeat.written]
    scores = [repeat.scores[place] for repeat in run.repeats]
    return {
        "score": statistics.fmean(scores),
        "scores": scores,
        "answers": [one.text for one in written],
        "tokens": [one.tokens for one in written],
        "ended": [one.ended for one in written],
        "repetition": [one.repetition for one in written],
    }


def cluster_labels(name: str, docs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Label the documents of a task so that those which are not independent share a label.

    These are a subject's, where documents have one, and WinoGrande's twins, which differ in a word or two that turn the
    answer over (Sakaguchi et al. 2020) and follow each other. All others have the task's name.
    """
    labels: list[str] = []
    before: Mapping[str, Any] | None = None
    for number, doc in enumerate(docs):
        if "sentence" in doc and "option1" in doc:
            twin = before is not None and _are_twins(before, doc)
            labels.append(labels[-1] if twin else f"{name} {number}")
            before = doc
        else:
            labels.append(str(doc.get("subject", name)))
    return labels


def _are_twins(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    same = {first["option1"], first["option2"]} == {second["option1"], second["option2"]}
    words = (doc["sentence"].split() for doc in (first, second))
    return same and difflib.SequenceMatcher(None, *words, autojunk=False).ratio() >= TWINS


def _verdict(task: ConfigurableTask, sample: Sample) -> dict[str, Any]:
    """Decide what the model answers, as lm-eval does: ``acc_norm`` divides by characters of the choice.

    In a task with several contexts and one continuation (WinoGrande) the choices, also to lm-eval, are the contexts.
    """
    doc, loglikelihoods = sample["doc"], [value for value, _ in sample["filtered_resps"]]
    choices = task.doc_to_choice(doc)
    gold: Any = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    said = Choices(loglikelihoods[: len(choices)], [len(choice) for choice in choices], gold)
    scored = [continuation for _, continuation, *_ in sample["arguments"]]
    return {
        **vars(said),
        "bytes": [len(text.encode()) for text in scored[: len(choices)]],
        "prediction_acc": said.best,
        "prediction_acc_norm": said.best_norm,
        "acc": bool(ACCURACY.per_item(said)),
        "acc_norm": bool(NORMALIZED_ACCURACY.per_item(said)),
    }


def derived(table: pa.Table, measure: ItemMeasure) -> float:
    """Average a measure over a table's items."""
    return float(item_values(table, measure).astype(np.float64).mean())
