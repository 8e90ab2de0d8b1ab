"""Records to what a person reads on stdout (layer 5)."""

from collections.abc import Sequence

from kdctl import console
from kdctl.records import (
    DistillReport,
    DistributionMetrics,
    Estimate,
    ExportReport,
    MethodResult,
    QuantizeReport,
    StoreManifest,
    VerifyReport,
)

WORST = 5


def interval(estimate: Estimate, digits: int = 4) -> str:
    """Write a value with its interval."""
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def mib(size: int) -> str:
    """Write a size in MiB."""
    return f"{size / 2**20:.1f} MiB"


def distribution_pairs(found: DistributionMetrics) -> list[tuple[str, str]]:
    """List the held-out numbers of a student."""
    return [
        ("KL(teacher‖student) per token", interval(found.forward_kl)),
        ("KL(student‖teacher) per token", interval(found.reverse_kl)),
        ("top-1 agreement", f"{100 * found.top1_agreement.value:.1f} %"),
        ("held-out perplexity", f"{found.perplexity.value:.2f} (teacher {found.teacher_perplexity:.2f})"),
        ("measured on", f"{found.tokens} completion tokens of {found.documents} documents; intervals are 95 %"),
    ]


def show_quantized(report: QuantizeReport) -> None:
    """Show what quantization cost and saved."""
    share = report.student_bytes / report.teacher_bytes
    kind = "symmetric" if report.symmetric else "asymmetric"
    pairs = [
        ("grid", f"{report.bits} bits, group size {report.group_size}, {kind}, {report.method}"),
        ("size", f"{mib(report.teacher_bytes)} → {mib(report.student_bytes)} ({100 * share:.0f} %)"),
        (
            "quantized",
            f"{report.quantized_parameters:,} of {report.quantized_parameters + report.other_parameters:,} "
            f"parameters in {len(report.layers)} layers, {report.seconds_s:.1f} s",
        ),
        *distribution_pairs(report.distribution),
        ("text perplexity", f"{report.text.perplexity.value:.2f} (teacher {report.teacher_text.perplexity.value:.2f})"),
    ]
    console.show_pairs("student", pairs)
    rows = [(e.name, f"{100 * e.relative_error:.2f} %", f"{e.sqnr_db:.1f}") for e in report.layers[:WORST]]
    console.show_rows("layers with the largest error", ("layer", "‖W − Q(W)‖/‖W‖", "SQNR dB"), rows)


def show_compared(results: Sequence[MethodResult]) -> None:
    """Show post-training methods side by side."""
    first = results[0]
    kind = "symmetric" if first.symmetric else "asymmetric"
    rows = [
        (
            one.method,
            f"{one.seconds_s:.1f}",
            interval(one.distribution.forward_kl),
            f"{100 * one.distribution.top1_agreement.value:.1f} %",
            f"{one.distribution.perplexity.value:.2f}",
            f"{one.text.perplexity.value:.2f}",
            f"{one.sqnr_db:.2f}",
        )
        for one in results
    ]
    title = f"{first.bits} bits, group size {first.group_size}, {kind}; {first.distribution.tokens} held-out tokens"
    columns = ("method", "seconds", "KL(teacher‖student)", "top-1", "perplexity", "text perplexity", "SQNR dB")
    console.show_rows(title, columns, rows)


def show_store(manifest: StoreManifest) -> None:
    """Show what a store holds."""
    sampling = manifest.sampling
    how = "from a data set" if sampling is None else f"temperature {sampling.temperature:g}, seed {sampling.seed}"
    if sampling is not None and sampling.min_new_tokens:
        how += f", end-of-sequence masked for the first {sampling.min_new_tokens} tokens"
    pairs = [
        ("completions", f"{manifest.rows} in {len(manifest.shards)} shards, {how}"),
        ("tokens", f"{manifest.completion_tokens} ({manifest.completion_tokens / manifest.rows:.1f} a completion)"),
    ]
    console.show_pairs(f"rollouts/{manifest.source}", pairs)


def show_examples(examples: Sequence[tuple[str, str]]) -> None:
    """Show decoded prompts and completions."""
    for prompt, completion in examples:
        console.show_text(f"--- prompt\n{prompt}\n--- completion\n{completion}\n")


def show_distilled(report: DistillReport) -> None:
    """Show what training changed."""
    pairs = [
        (
            "trained",
            f"{report.steps} steps, {report.completion_tokens_trained} completion tokens, "
            f"{report.step_seconds_median_s:.2f} s a step (median)",
        ),
        *_early_stop(report),
        ("KL before", interval(report.before.forward_kl)),
        *distribution_pairs(report.after),
        (
            "KL removed",
            f"{100 * report.removed.value:.1f} % [{100 * report.removed.low:.1f}, {100 * report.removed.high:.1f}]",
        ),
    ]
    console.show_pairs(report.variant, pairs)


def _early_stop(report: DistillReport) -> list[tuple[str, str]]:
    """Say which step was kept where it is not the last of all."""
    why = {"steps": "all steps were done", "patience": "no new low of held-out KL came after it"}[report.stopped]
    if report.stopped == "steps" and report.kept_step in (None, report.steps):
        return []
    return [("kept", f"the student after step {report.kept_step}; training stopped because {why}")]


def show_exported(report: ExportReport) -> None:
    """Show where an export lies and what it kept."""
    pairs = [("path", report.path), ("size", mib(report.size_bytes))]
    if report.exact_blocks is not None:
        pairs += [
            ("codes", f"all kept, in {report.block_type} blocks of 32"),
            ("scale and offset exact", f"{100 * report.exact_blocks:.2f} % of blocks"),
            (
                "largest difference from Q(W)",
                f"{report.largest_difference:.3g} (in llama.cpp, which does not round Q(W))",
            ),
            ("the same, rounded like Q(W)", f"{report.rounded_difference:.3g} (in transformers)"),
        ]
    console.show_pairs(f"{report.format} export", pairs)


def show_verified(report: VerifyReport) -> None:
    """Show every check and the verdict."""
    console.show_pairs(report.folder, [(check.name, f"{check.status}: {check.detail}") for check in report.checks])
    unknown = [check.name for check in report.checks if check.status == "unknown"]
    verdict = "verified" if report.passed else "NOT verified"
    console.show_text(verdict + (f"; unknown: {', '.join(unknown)}" if unknown else ""))
