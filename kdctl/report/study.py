"""One or several run folders as frozen records: every model with its settings, scores, items and training.

What a report says is computed from a ``Study`` and nothing else. Big tables are read when they are first asked for.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np

from kdctl.base.errors import DataError
from kdctl.config.preset import Preset
from kdctl.report.samples import (
    Bits,
    Items,
    document_differences,
    item_differences,
    read_bits,
    read_by_prompt,
    read_documents,
    read_items,
)
from kdctl.rollout.store import RolloutStore
from kdctl.run.documents import Array, PerDocument
from kdctl.run.paths import RunDir
from kdctl.run.records import DistillReport, DistributionMetrics, EvalResult, MethodResult, QuantizeReport, TextMetrics
from kdctl.run.sums import SUMS, listed_sums
from kdctl.run.tracking import read_metrics

Kind = Literal["teacher", "ptq", "variant", "foreign"]
Text = Literal["heldout", "student_written", "ptq_written"]
"""Who wrote the held-out completions that a model was measured on: the teacher, itself, or the PTQ student."""
HELDOUT: Text = "heldout"
STUDENT_WRITTEN: Text = "student_written"
PTQ_WRITTEN: Text = "ptq_written"


@dataclass(frozen=True)
class Settings:
    """What made a model, as far as it is known; None where it is not or where it has no meaning."""

    lmbda: float | None = None
    beta: float | None = None
    lr: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    """Sequences in one optimizer step."""
    max_new_tokens: int | None = None
    """Longest student rollout; None where λ is 0."""
    train: str | None = None
    rank: int | None = None
    """Of low-rank updates; None where something else learns."""
    seed: int | None = None
    method: str | None = None
    """Of post-training quantization."""
    grid: str | None = None
    mix: str | None = None
    """Weights of the sources of prompts, where there are several."""
    rest: str = ""
    """All other distill settings that decide the weights, canonical JSON."""

    def key(self, *without: str) -> tuple[object, ...]:
        """Return all settings but some, to find those that differ in nothing else."""
        return tuple(value for name, value in vars(self).items() if name not in without)


@dataclass(frozen=True)
class Score:
    """A task's accuracy, a share in [0, 1], or its bits per byte, as it was reported."""

    value: float
    standard_error: float | None = None
    items: int | None = None


@dataclass(frozen=True)
class Model:
    """One row of a report. What it was not measured on is None or empty."""

    name: str
    kind: Kind
    settings: Settings = Settings()
    scores: dict[str, Score] = field(default_factory=dict)
    """Accuracies by task, in the order of evaluation."""
    rolling: dict[str, Score] = field(default_factory=dict)
    """Bits per byte, by task that scores whole documents; fewer are better."""
    folders: tuple[str, ...] = ()
    """Names of the run folders that it belongs to; several where joined folders share it."""
    run: RunDir | None = None
    key: str = ""
    """Its name in ``run``."""
    result: EvalResult | None = None
    quantized: QuantizeReport | None = None
    distilled: DistillReport | None = None
    train_loss: float | None = None
    """Mean over the last tenth of the steps, nats a token."""

    @property
    def distribution(self) -> DistributionMetrics | None:
        """Held-out KL, agreement and perplexity: of the evaluation, else of when the model was made."""
        found = self.result or self.quantized
        return found.distribution if found else None

    @property
    def text(self) -> TextMetrics | None:
        """Perplexity on plain text."""
        found = self.result or self.quantized
        return found.text if found else None

    @property
    def size_bytes(self) -> int | None:
        """Size of the weights on disk."""
        if self.result:
            return self.result.size_bytes
        return self.quantized.student_bytes if self.quantized else None

    @property
    def tasks(self) -> list[str]:
        """All tasks that it was evaluated on."""
        return [*self.scores, *self.rolling]

    def items(self, task: str, measure: str = "") -> Items | None:
        """Read the answers to a task, by its headline measure or another; None where items were not kept.

        Raises StoreError if they are damaged.
        """
        key = (task, measure)
        if key not in self._items and self.run is not None and self.result is not None and task in self.tasks:
            path = self.run.samples(self.key, task)
            self._items[key] = read_items(path, measure or self.result.tasks[task].metric, self.result.samples)
        return self._items.get(key)

    def bits(self, task: str) -> Bits | None:
        """Read what a task's right choices or whole documents cost; None where that was not kept. Raises as items."""
        if task not in self._bits and self.run is not None and self.result is not None and task in self.tasks:
            self._bits[task] = read_bits(self.run.samples(self.key, task), self.result.samples)
        return self._bits.get(task)

    @cached_property
    def _bits(self) -> dict[str, Bits | None]:
        return {}

    @cached_property
    def _items(self) -> dict[tuple[str, str], Items | None]:
        return {}

    @cached_property
    def documents(self) -> PerDocument | None:
        """Sums of each held-out document. Raises StoreError if they are damaged."""
        if self.run is None:
            return None
        found = read_documents(self.run.samples(self.key, HELDOUT), self.result.samples) if self.result else None
        if found is not None or self.kind not in ("ptq", "variant"):
            return found
        folder = student_folder(self.run, self.key)
        sums = listed_sums(folder) if (folder / SUMS).exists() else {}
        return read_documents(folder / f"{HELDOUT}.parquet", sums)

    @cached_property
    def own_text(self) -> PerDocument | None:
        """Sums of each held-out prompt's completion by the model itself, by prompt. Raises like ``documents``."""
        return self._by_prompt(STUDENT_WRITTEN)

    @cached_property
    def ptq_text(self) -> PerDocument | None:
        """Sums of each held-out prompt's completion by the PTQ student, by prompt. Raises like ``documents``."""
        return self._by_prompt(PTQ_WRITTEN) if self.result and self.result.ptq_text else None

    def _by_prompt(self, text: Text) -> PerDocument | None:
        if self.run is None or self.result is None:
            return None
        return read_by_prompt(self.run.samples(self.key, text), self.result.samples)

    def on(self, text: Text) -> PerDocument | None:
        """Return the sums of each held-out document that somebody wrote. Raises like ``documents``."""
        if text == HELDOUT:
            return self.documents
        return self.own_text if text == STUDENT_WRITTEN else self.ptq_text

    @cached_property
    def own_completions(self) -> tuple[Array, Array] | None:
        """Tokens of each of those completions, and 1 where it ended by itself, by prompt; None where there are none."""
        store = RolloutStore(self.run.eval(self.key) / "rollouts") if self.run else None
        if store is None or not store.finished or self.own_text is None:
            return None
        rows = sorted(store.read(), key=lambda one: one.prompt_id)
        ended = [float(one.finish_reason == "stop") for one in rows]
        return np.array([float(len(one.completion_ids)) for one in rows]), np.array(ended)

    @property
    def teacher_weights(self) -> str:
        """Fingerprint of the teacher, empty where it is not known."""
        folder = self.distilled or self.quantized
        if folder:
            return folder.teacher
        return self.result.weights if self.result and self.kind == "teacher" else ""

    @cached_property
    def curve(self) -> list[dict[str, float]]:
        """Lines of metrics.jsonl, one a step; empty for a model that was not trained here."""
        if self.run is None or self.distilled is None:
            return []
        return read_metrics(self.run.variant(self.key).metrics, self.distilled.metrics)


@dataclass(frozen=True)
class Source:
    """A run folder of a study."""

    name: str
    run: RunDir
    preset: Preset | None
    methods: tuple[MethodResult, ...]
    """What ``kdctl quantize --compare`` left."""


@dataclass(frozen=True)
class Study:
    """Models that may be compared, in the order of a report: teachers, PTQ students, foreign models, variants."""

    models: tuple[Model, ...]
    sources: tuple[Source, ...] = ()

    @property
    def tasks(self) -> list[str]:
        """Tasks of any model that have an accuracy, in the order of their first appearance."""
        return list(dict.fromkeys(task for model in self.models for task in model.scores))

    @property
    def rolling(self) -> list[str]:
        """Tasks of any model that score whole documents, in the order of their first appearance."""
        return list(dict.fromkeys(task for model in self.models for task in model.rolling))

    def baseline(self, model: Model, kind: Kind) -> Model | None:
        """Return the teacher or the PTQ student that a model came from."""
        found = (one for one in self.models if one.kind == kind and one is not model)
        return next((one for one in found if not model.folders or set(one.folders) & set(model.folders)), None)

    def settings_groups(self) -> list[list[Model]]:
        """Group the students: variants that differ in nothing but the seed together, every other model alone.

        The same seed trained twice, in joined folders, is no other seed: each group has a seed once.
        """
        groups: dict[object, list[Model]] = {}
        seen: Counter[object] = Counter()
        for model in self.models:
            if model.distilled is None:
                groups[model.name] = [model]
                continue
            made = (model.distilled.student, model.settings.key("seed"))
            repeat = seen[made, model.settings.seed]
            seen[made, model.settings.seed] += 1
            groups.setdefault((made, repeat), []).append(model)
        return list(groups.values())


def student_folder(run: RunDir, name: str) -> Path:
    """Return where the weights of the PTQ student or of a variant lie."""
    return run.student if name == "ptq" else run.variant(name).final


def differences(a: Model, b: Model) -> list[str]:
    """List what keeps two models from being compared, on the tasks and documents that both have."""
    shared = [task for task in a.tasks if task in b.tasks]
    found = [reason for task in shared for reason in _task_differences(task, a, b)]
    return found + _document_differences(a, b)


def _document_differences(a: Model, b: Model) -> list[str]:
    if a.documents is None or b.documents is None:
        return []
    return document_differences(a.documents, b.documents)


def _teacher_differences(a: Model, b: Model) -> list[str]:
    first, second = a.teacher_weights, b.teacher_weights
    return [] if first == second else [f"teacher weights {first[:16]} and {second[:16]}"]


def _task_differences(task: str, a: Model, b: Model) -> list[str]:
    """Compare version, headline metric, number of examples, limit and, last, every item."""
    if a.result is None or b.result is None:
        return []
    first, second = a.result.tasks[task], b.result.tasks[task]
    pairs = [
        ("version", first.version, second.version),
        ("metric", first.metric, second.metric),
        ("num_fewshot", first.num_fewshot, second.num_fewshot),
        ("limit", a.result.limit, b.result.limit),
    ]
    found = [f"{name} {left} and {right}" for name, left, right in pairs if left != right]
    items, others = a.items(task), b.items(task)
    if items is not None and others is not None:
        found += item_differences(items, others)
    return [f"{task}: {reason}" for reason in found]


def require_comparable(study: Study) -> None:
    """Raise DataError, listing every difference, unless all models answered the same questions about one teacher."""
    lines = [f"  {line}" for line in _obstacles(study)]
    if lines:
        raise DataError(
            "these results cannot be compared:\n" + "\n".join(lines) + "\nA difference between such models would mix "
            "the models with what they were asked. Evaluate all of them alike, kdctl eval --run FOLDER with one set of "
            "eval settings (and --also with --as for a model made elsewhere), or report the folders apart."
        )


def _obstacles(study: Study) -> list[str]:
    """Compare every model with the first one that has the task, the documents or a known teacher."""
    found: list[str] = []

    def against_first(models: Sequence[Model], compare: Callable[[Model, Model], list[str]]) -> None:
        for other in models[1:]:
            found.extend(f"{models[0].name} and {other.name}: {reason}" for reason in compare(models[0], other))

    against_first([model for model in study.models if model.teacher_weights], _teacher_differences)
    for task in (*study.tasks, *study.rolling):
        against_first([model for model in study.models if task in model.tasks], partial(_task_differences, task))
    against_first([model for model in study.models if model.documents is not None], _document_differences)
    return found
