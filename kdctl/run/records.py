"""What kdctl writes to disk, as typed records.

JSON files are frozen pydantic models; rollouts, of which there are many, are plain dataclasses. What only one folder
writes has its own ``records.py`` there.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kdctl.run.measures import TokenMeasure

Message = dict[str, str]
FinishReason = Literal["stop", "length"]
StopReason = Literal["steps", "patience", "settled"]


class Record(BaseModel):
    """Base of all JSON records: frozen, closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


@dataclass(frozen=True)
class Prompt:
    """A chat prompt, tokenized; ``completion_ids`` only where a data set brought the answer."""

    id: str
    index: int
    prompt_ids: list[int]
    completion_ids: list[int] | None = None


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt and what made it.

    ``logprobs`` are natural-log probabilities of the completion tokens under the model that wrote them, unmasked and at
    temperature 1; None for data-set completions, which no model wrote.
    """

    prompt_id: str
    prompt_index: int
    sample_index: int
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason
    policy_step: int
    seed: int
    source: str


class Versions(Record):
    """Versions of kdctl and of the libraries that decide its numbers."""

    kdctl: str
    torch: str
    transformers: str
    compressed_tensors: str
    quantizers: dict[str, str] = {}
    """Packages of post-training methods that are installed."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, found: Any) -> Any:
        """Read records that have one field for each package."""
        old = {"hqq": "hqq", "auto_round": "auto-round"}
        if not isinstance(found, dict) or not found.keys() & old:
            return found
        packages = {package: found[name] for name, package in old.items() if found.get(name)}
        return {name: value for name, value in found.items() if name not in old} | {"quantizers": packages}


class Estimate(Record):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Tell whether there is an interval; one document has none."""
        return math.isfinite(self.high - self.low)


class ShardEntry(Record):
    """One shard of a rollout store."""

    file: str
    rows: int = Field(ge=1)
    completion_tokens: int = Field(ge=0)
    sha256: str
    policy_step: int = 0


class SamplingRecord(Record):
    """How the completions of a store were sampled; ``min_new_tokens`` > 0 means end-of-sequence was masked."""

    temperature: float
    top_p: float
    top_k: int
    min_new_tokens: int
    max_new_tokens: int
    seed: int


class ServerRecord(Record):
    """The servers that wrote a store, and what was asked of them. Its address and key are written nowhere."""

    kind: str
    """``vllm``, ``sglang`` or ``llama-server``."""
    version: str
    model: str
    """What the server calls the model."""
    servers: int
    request: dict[str, Any]
    """Every field of a request but the prompt; each has a seed of its own."""
    gap: float
    """Mean absolute difference of log-probabilities, nats a token, to those computed in process, when last looked."""


class EngineRecord(Record):
    """What sampled the completions of a store, and whether equal settings sample equal tokens again.

    A store of an engine that is not reproducible is kept: it cannot be written again byte for byte.
    """

    name: str = "transformers"
    reproducible: bool = True
    server: ServerRecord | None = None


class StoreManifest(Record):
    """Index of a rollout store, written last; free of clock times so that equal runs leave equal bytes."""

    source: str
    identity: str
    writer: str
    """Fingerprint of the model (or data set) that wrote the completions."""
    sampling: SamplingRecord | None
    shards: tuple[ShardEntry, ...]
    steps: dict[str, tuple[int, int]] = {}
    """Live stores only: training steps "first-last" to the (first, last + 1) rows written for them."""
    skipped_prompts: int = 0
    """Prompts left out because they were longer than max_prompt_tokens."""
    engine: EngineRecord = EngineRecord()
    """What sampled; written only where it is another than kdctl's own, which nothing said at first."""

    @model_serializer(mode="wrap")
    def _without_own_engine(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the bytes of a manifest, and so every identity that is made of them, as they were."""
        values = handler(self)
        if self.engine == EngineRecord():
            values.pop("engine", None)
        return values

    @property
    def rows(self) -> int:
        """Rollouts in the store."""
        return sum(shard.rows for shard in self.shards)

    @property
    def completion_tokens(self) -> int:
        """Completion tokens in the store."""
        return sum(shard.completion_tokens for shard in self.shards)


class LayerError(Record):
    """Quantization error of one layer."""

    name: str
    relative_error: float | None
    """Frobenius norm of W − Q(W) over that of W; None where W is zero."""
    sqnr_db: float | None
    """Signal to quantization noise ratio, 20·log10 of the inverse of relative_error."""


class DistributionMetrics(Record):
    """Student against teacher, per completion token (of the yardstick unless said), with intervals over documents.

    Measures that were declared later stand beside these under their own names, where they were taken.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Estimate] = Field(init=False)

    forward_kl: Estimate
    reverse_kl: Estimate | None = None
    """None of a server, which states no distributions; so is the next."""
    top1_agreement: Estimate | None = None
    perplexity: Estimate
    teacher_perplexity: float
    documents: int
    tokens: int

    def estimate(self, measure: TokenMeasure) -> Estimate | None:
        """Return a measure's estimate; None where it was not taken."""
        found = dict(self).get(measure.name)
        return found if isinstance(found, Estimate) else None


class TextMetrics(Record):
    """Perplexity on plain text."""

    perplexity: Estimate
    tokens: int
    documents: int


class StudentFolder(Record):
    """What a student folder's quantize.json or distill.json has in common."""

    identity: str
    teacher: str
    """Fingerprint of the teacher's weights."""
    bits: int
    group_size: int
    symmetric: bool
    method: str


class QuantizeReport(StudentFolder):
    """``student/quantize.json``."""

    skip: tuple[str, ...]
    teacher_bytes: int
    student_bytes: int
    quantized_parameters: int
    other_parameters: int
    layers: tuple[LayerError, ...]
    yardstick: str
    """Hash of the held-out rollouts and the text that the next three were measured on; items in heldout.parquet."""
    distribution: DistributionMetrics
    text: TextMetrics
    teacher_text: TextMetrics
    seconds_s: float
    versions: Versions


class MethodResult(Record):
    """``compare/<method>.json``: what one post-training method reaches."""

    identity: str
    bits: int
    group_size: int
    symmetric: bool
    method: str
    seconds_s: float
    sqnr_db: float
    """10·log10(Σ‖W‖² / Σ‖W − Q(W)‖²) over all quantized layers."""
    yardstick: str
    distribution: DistributionMetrics
    text: TextMetrics
    versions: Versions


class CheckpointMeta(Record):
    """JSON beside a checkpoint's tensors. metrics: sha256 of the lines of ``metrics.jsonl`` up to the step."""

    identity: str
    step: int
    """Optimizer steps done."""
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 of each file of tensors; every process writes one."""
    sha256: str = ""
    """That of ``state.safetensors``, the only file of checkpoints that one process wrote for all."""
    metrics: str | None = None


class DistillReport(StudentFolder):
    """``distill/<variant>/distill.json``, written last."""

    variant: str
    settings: dict[str, object]
    """The whole resolved distill section."""
    mix: str | None = None
    """``prompts.mix`` of the sequences that were trained on."""
    student: str
    """Fingerprint of the student that training started from."""
    stores: dict[str, str]
    """Rollout stores that were read or written, by source, with the sha256 of their manifests."""
    before: DistributionMetrics
    after: DistributionMetrics
    removed: Estimate
    """1 − KL(distilled)/KL(PTQ student) on the yardstick."""
    final_loss: float
    steps: int
    """Optimizer steps done."""
    kept_step: int | None = None
    """The step whose student is ``final/``."""
    stopped: StopReason = "steps"
    """``distill.steps`` were done; or in ``distill.patience`` measurements held-out KL found no new low, or surely fell
    by less than 1 %."""
    train_seconds_s: float
    step_seconds_median_s: float
    completion_tokens_trained: int
    metrics: str | None = None
    """The sha256 of ``metrics.jsonl``."""
    versions: Versions


class WrittenAnswers(Record):
    """What a model's answers to the items of one task are like. tokens and repetition: means over answers."""

    samples: int
    """Answers to each item."""
    temperature: float | None = None
    """As ``eval.temperature`` set it; the task's own without."""
    tokens: float
    ended: float
    """Share that ended before the longest length."""
    repetition: float
    """Share of runs of four tokens that the answer had before."""
    seconds_s: float
    """Of writing them all."""


class TaskScore(Record):
    """Scores of one lm-eval task."""

    version: str
    metric: str
    """The headline metric: of multiple choice ``acc_norm``, else ``acc``; of whole documents ``bits_per_byte``; else
    ``f1``, else the task's first."""
    value: float
    stderr: float
    items: int
    num_fewshot: int
    metrics: dict[str, float]
    asked: int | None = None
    """Items that the model answered, where ``eval.allocation`` left the others to the teacher's answers."""
    answers: WrittenAnswers | None = None
    """Only of a task that generates."""


class EvalResult(Record):
    """``eval/<model>/results.json``."""

    model: str
    """``teacher``, ``ptq``, a variant, or the name of a model made elsewhere."""
    identity: str
    weights: str
    """Fingerprint of the evaluated weights."""
    limit: int | None
    tasks: dict[str, TaskScore]
    samples: dict[str, str] = {}
    """Files of ``samples/`` with their sha256."""
    distribution: DistributionMetrics
    student_written: DistributionMetrics | None = None
    """The same on the model's own completions of the same prompts; None where ``eval.student_written`` is off."""
    ptq_written: DistributionMetrics | None = None
    """The same on the PTQ student's completions, one text for all students."""
    ptq_text: str | None = None
    """Fingerprint of those completions."""
    text: TextMetrics
    text_distribution: DistributionMetrics | None = None
    """Student against teacher on that text, per token of it."""
    size_bytes: int | None
    """None of a server."""
    seconds_s: float
    versions: Versions
    settings: dict[str, object] = {}
    """λ, β, lr and the other distill settings of a variant."""
    reference: str | None = None
    """Only for a model that kdctl did not make here: the folder, Hub id or server's address that was named."""
    served: str | None = None
    """Of a server: what it is and serves. KL is then estimated by the drawn tokens alone."""
    layers: tuple[Estimate, ...] = ()
    """``kdctl compare --by-layer``: KL(teacher‖teacher with one decoder layer of this model), nats a token."""
