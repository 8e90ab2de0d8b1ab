"""The model card of a student folder: records to Markdown, with the metadata that the Hub reads."""

import re
from dataclasses import dataclass

from kdctl.config.preset import DistillSection
from kdctl.formats.kernels import BITS, GROUPS
from kdctl.run.measures import PERPLEXITY, TOKEN_MEASURES, Unit, fixed
from kdctl.run.records import DistributionMetrics, Estimate, QuantizeReport, TextMetrics

LICENSE = re.compile(r"[\w.-]+")
DIGITS: dict[Unit, int] = {"nats": 4, "share": 4, "perplexity": 2}


@dataclass(frozen=True)
class Origin:
    """Where the teacher came from. hub_id: only for a teacher from the Hub. license: only if its card says one."""

    teacher: str
    hub_id: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Training:
    """How a distilled student was trained and what it gained. steps: those behind this student."""

    variant: str
    settings: DistillSection
    steps: int
    before: DistributionMetrics
    removed: Estimate


def model_card(report: QuantizeReport, origin: Origin, training: Training | None = None) -> str:
    """Write README.md of a student folder. training: None for a PTQ student."""
    parts = [
        _metadata(report, origin, training),
        f"# {_title(report, origin, training)}",
        _summary(report, origin, training),
        _settings(report, training),
        _numbers(report, training),
        _loading(report),
        f"Made with kdctl {report.versions.kdctl}; `SHA256SUMS` covers every file, `kdctl verify FOLDER` proves it.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(report: QuantizeReport, origin: Origin, training: Training | None) -> str:
    """Write the YAML front matter; what is not known is left out."""
    lines = ["---"]
    if origin.license and LICENSE.fullmatch(origin.license):
        lines.append(f"license: {origin.license}")
    if origin.hub_id:
        lines += [f"base_model: {origin.hub_id}", "base_model_relation: quantized"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    tags = ["compressed-tensors", f"int{report.bits}", "kdctl", *(["knowledge-distillation"] if training else [])]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _title(report: QuantizeReport, origin: Origin, training: Training | None) -> str:
    name = origin.teacher.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return f"{name}, INT{report.bits}" + (f", distilled ({training.variant})" if training else "")


def _summary(report: QuantizeReport, origin: Origin, training: Training | None) -> str:
    share = report.student_bytes / report.teacher_bytes
    how = (
        "trained by distillation from its own full-precision self" if training else "made by post-training quantization"
    )
    return (
        f"`{origin.teacher}` with the weights of {len(report.layers)} linear layers on a {report.bits}-bit integer "
        f"grid, {how}. The files are {report.student_bytes / 2**20:.1f} MiB, {100 * share:.0f} % of the teacher's; "
        "embeddings, norms and the output head are not quantized. The teacher's weights have the kdctl fingerprint "
        f"`{report.teacher[:16]}`."
    )


def _learned(settings: DistillSection) -> str:
    """Name what training moved."""
    kinds = {
        "weights": "weights",
        "lora": "low-rank updates inside the rounding",
        "scales": "scales, codes as they were",
    }
    return "; ".join([kinds[settings.train], *settings.learns_too])


def _settings(report: QuantizeReport, training: Training | None) -> str:
    kind = "symmetric" if report.symmetric else "asymmetric"
    rows = [
        ("grid", f"{report.bits} bits, group size {report.group_size}, {kind}"),
        ("method", report.method),
        ("left in full precision", ", ".join(["the output head", *(f"`{pattern}`" for pattern in report.skip)])),
    ]
    if training:
        settings = training.settings
        rows += [
            ("λ (share of student-written sequences)", f"{settings.lmbda:g}"),
            ("β (0 forward KL, 1 reverse KL)", f"{settings.beta:g}"),
            ("training", f"{training.steps} steps, learning rate {settings.lr:g}, seed {settings.seed}"),
            ("what learned", _learned(settings)),
        ]
    return "## Settings\n\n" + _table(("setting", "value"), rows)


def _numbers(report: QuantizeReport, training: Training | None) -> str:
    found = report.distribution
    teacher = {PERPLEXITY.name: f"; teacher {fixed(found.teacher_perplexity, 2)}"}
    rows = [
        (one.label, _interval(estimate, DIGITS[one.unit]) + teacher.get(one.name, ""))
        for one in TOKEN_MEASURES.values()
        if (estimate := found.estimate(one))
    ]
    rows += [
        (
            "text perplexity",
            f"{_text(report.text)}; teacher {fixed(report.teacher_text.perplexity.value, 2)}",
        ),
    ]
    if training:
        rows += [
            ("KL(teacher‖student) before training", _interval(training.before.forward_kl)),
            ("share of that KL removed", _interval(training.removed)),
        ]
    where = (
        f"On {found.tokens} completion tokens of {found.documents} held-out documents, written by the teacher; "
        "brackets are 95 % bootstrap intervals over documents. Text perplexity is on Python's help topics."
    )
    return "## Measured\n\n" + _table(("figure", "value"), rows) + "\n\n" + where


def _loading(report: QuantizeReport) -> str:
    """Say how to open the folder, and claim of other programs only what they document."""
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")  # needs the package compressed-tensors\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    )
    return f"## Loading\n\n```python\n{code}\n```\n\n{_vllm(report)}\n\nllama.cpp: `kdctl export` writes a GGUF file."


def _vllm(report: QuantizeReport) -> str:
    kind = "symmetric" if report.symmetric else "asymmetric"
    name = f"W{report.bits}A16, {kind}, with group size {report.group_size}"
    if report.bits in BITS[report.symmetric] and report.group_size in GROUPS:
        return f"vLLM documents this format ({name}): `vllm serve FOLDER`. vLLM was not run when this folder was made."
    return (
        f"transformers only: vLLM documents weight-only `pack-quantized` folders of {_listed(BITS[True])} bits "
        f"(asymmetric: {_listed(BITS[False])}) and group sizes {_listed(GROUPS)}, not {name}; vLLM was "
        "not run when this folder was made."
    )


def _listed(numbers: tuple[int, ...]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def _text(found: TextMetrics) -> str:
    """Give perplexity on plain text; one document has no interval over documents."""
    return (
        _interval(found.perplexity, 2) if found.documents > 1 else f"{fixed(found.perplexity.value, 2)} (one document)"
    )


def _interval(estimate: Estimate, digits: int = 4) -> str:
    value, low, high = (fixed(one, digits) for one in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in [header, ("---", "---"), *rows])
