"""Records to what a person reads on stdout."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdctl.cli import console
from kdctl.cost.records import CostPlan, Part, Phase, Rates, Room, Timing
from kdctl.formats.records import ExportReport, VerifyReport
from kdctl.run.measures import PERPLEXITY, TOKEN_MEASURES, TokenMeasure, Unit, column_measures, fixed
from kdctl.run.records import (
    DistillReport,
    DistributionMetrics,
    Estimate,
    LayerError,
    MethodResult,
    QuantizeReport,
    StoreManifest,
)
from kdctl.sweep.records import SweepReport, TrialRecord

WORST = 5
SMALL = 2**30 / 100
"""Bytes. Less is written in MiB."""


def interval(estimate: Estimate, digits: int = 4) -> str:
    """Write a value with its interval."""
    return f"{fixed(estimate.value, digits)} [{fixed(estimate.low, digits)}, {fixed(estimate.high, digits)}]"


UNITS: dict[Unit, Callable[[Estimate], str]] = {
    "nats": interval,
    "share": lambda found: f"{100 * found.value:.1f} %",
    "perplexity": lambda found: fixed(found.value, 2),
}


def mib(size: int) -> str:
    """Write a size in MiB."""
    return f"{size / 2**20:.1f} MiB"


def gib(size: float, unit: str = " GiB") -> str:
    """Write a size in GiB, or in MiB where that would be next to nothing."""
    return f"{size / 2**30:.2f}{unit}" if size >= SMALL else f"{size / 2**20:.2g} MiB"


def distribution_pairs(found: DistributionMetrics) -> list[tuple[str, str]]:
    """List the held-out numbers of a student."""
    teacher = {PERPLEXITY.name: f" (teacher {fixed(found.teacher_perplexity, 2)})"}
    pairs = [
        (one.label, measured(found, one) + teacher.get(one.name, ""))
        for one in TOKEN_MEASURES.values()
        if found.estimate(one)
    ]
    where = f"{found.tokens} completion tokens of {found.documents} documents; intervals are 95 %"
    return [*pairs, ("measured on", where)]


def measured(found: DistributionMetrics, measure: TokenMeasure) -> str:
    """Write a measure; nothing where it was not taken."""
    estimate = found.estimate(measure)
    return UNITS[measure.unit](estimate) if estimate else ""


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
        (
            "text perplexity",
            f"{fixed(report.text.perplexity.value, 2)} (teacher {fixed(report.teacher_text.perplexity.value, 2)})",
        ),
    ]
    console.show_pairs("student", pairs)
    rows = [(one.name, *_error(one)) for one in report.layers[:WORST]]
    console.show_rows("layers with the largest error", ("layer", "‖W − Q(W)‖/‖W‖", "SQNR dB"), rows)


def _error(layer: LayerError) -> tuple[str, str]:
    """Write a layer's error and its SQNR; a layer of zeros has nothing that an error could be relative to."""
    if layer.relative_error is None or layer.sqnr_db is None:
        return "–", "–"
    return f"{100 * layer.relative_error:.2f} %", f"{layer.sqnr_db:.1f}" if layer.relative_error else "inf"


def show_compared(results: Sequence[MethodResult]) -> None:
    """Show post-training methods side by side."""
    first = results[0]
    kind = "symmetric" if first.symmetric else "asymmetric"
    rows = [
        (
            one.method,
            f"{one.seconds_s:.1f}",
            *(measured(one.distribution, measure) for measure in column_measures()),
            fixed(one.text.perplexity.value, 2),
            f"{one.sqnr_db:.2f}",
        )
        for one in results
    ]
    title = f"{first.bits} bits, group size {first.group_size}, {kind}; {first.distribution.tokens} held-out tokens"
    headings = (measure.heading for measure in column_measures())
    columns = ("method", "seconds", *headings, "text perplexity", "SQNR dB")
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
    """Show decoded prompts and completions, with the control characters in them escaped."""
    for prompt, completion in examples:
        console.show_text(console.harmless(f"--- prompt\n{prompt}\n--- completion\n{completion}\n"))


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
    reasons = {
        "steps": "all steps were done",
        "patience": "no new low of held-out KL came after it",
        "settled": "held-out KL, paired over documents, hardly fell any more",
    }
    why = reasons[report.stopped]
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
    """Show every check and the verdict; a reason that several checks have is said once."""
    first: dict[str, str] = {}
    pairs = []
    for check in report.checks:
        name = first.setdefault(check.detail, check.name)
        reason = check.detail if name == check.name else f"for the same reason as {name}"
        pairs.append((check.name, f"{check.status}: {reason}"))
    console.show_pairs(report.folder, pairs)
    verdict = "verified" if report.passed else "NOT verified"
    for status in ("failed", "unknown"):
        if names := [check.name for check in report.checks if check.status == status]:
            verdict += f"; {status}: {', '.join(names)}"
    console.show_text(verdict)


def trial_rows(trials: Sequence[TrialRecord]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a sweep's table: one column a swept field."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    header = ["trial", *(key.rpartition(".")[2] for key in keys)]
    rows = [[str(trial.number), *(_cell(trial.values, key) for key in keys)] for trial in trials]
    return header, rows


def _cell(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key, "")
    return f"{value:g}" if isinstance(value, float) else str(value)


def sweep_table(report: SweepReport) -> tuple[str, list[str], list[list[str]]]:
    """Return title, header and rows of a sweep that is under way or done."""
    header, rows = trial_rows(report.trials)
    for trial, row in zip(report.trials, rows, strict=True):
        metric = "" if trial.metric is None else fixed(trial.metric, 4)
        left = "" if trial.left_s is None else duration(trial.left_s)
        steps = f"{trial.step}/{trial.steps}" if trial.steps else ""
        row += [trial.status + (" (best)" if metric and trial.variant == report.best else ""), steps, left, metric]
    done = sum(trial.status == "complete" for trial in report.trials)
    title = f"{report.sweep}: {done} of {len(report.trials)} trials{time_left(report)}"
    return title, [*header, "status", "steps", "left", report.metric], rows


def time_left(report: SweepReport) -> str:
    """Estimate how long the rest of a sweep takes, from what a step of finished trials took with its evaluation."""
    done = [(trial.seconds_s, trial.steps) for trial in report.trials if trial.seconds_s is not None]
    if not done or not all(trial.steps for trial in report.trials):
        return ""
    pace = sum(seconds for seconds, _ in done) / sum(steps for _, steps in done)
    left = sum(trial.steps - trial.step for trial in report.trials if trial.status in ("waiting", "running"))
    at_once = max(1, sum(trial.status == "running" for trial in report.trials))
    return f", about {duration(left * pace / at_once)} left" if left else ""


def duration(seconds: float) -> str:
    """Write a duration as people do."""
    if seconds < 90:
        return f"{seconds:.{2 if seconds < 1 else 1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def draw_sweep(report: SweepReport) -> console.Table:
    """Lay out a sweep that is under way."""
    return console.make_table(*sweep_table(report))


def show_sweep(report: SweepReport) -> None:
    """Show every trial of a sweep and where the rest is."""
    title, header, rows = sweep_table(report)
    _show_variants(title, header, rows, report.trials)
    console.show_text(f"kdctl report --run {report.folder} prints the variants' table with error bars")


def show_trials(trials: Sequence[TrialRecord]) -> None:
    """Show what a sweep would run."""
    _show_variants("trials", *trial_rows(trials), trials)


def _show_variants(title: str, header: list[str], rows: list[list[str]], trials: Sequence[TrialRecord]) -> None:
    """Print a sweep's table with the variants' names last."""
    named = [[*row, trial.variant or ""] for row, trial in zip(rows, trials, strict=True)]
    console.show_rows(title, [*header, "variant"], named)


def show_plan(plan: CostPlan) -> None:
    """Show what a run will take, and what to change where it does not fit."""
    total = plan.quantized_parameters + plan.other_parameters
    tokens = ", ".join(f"{count:,} by {name}" for name, count in plan.generated_tokens.items())
    pairs = [
        (
            "parameters",
            f"{total:,}, of them {plan.quantized_parameters:,} quantized; {plan.trained_parameters:,} learn",
        ),
        ("tokens to generate, at most", tokens),
        ("to train on, at most", f"{plan.trained_sequences:,} sequences, {plan.trained_tokens:,} tokens"),
        *((f"memory, {phase.name}", _phase(phase)) for phase in plan.phases),
        ("RAM, if it is free", f"{gib(plan.checkpoint_copy_bytes)}: copy of a checkpoint while it is written"),
        ("disk", f"{gib(plan.disk.needed_bytes)}: {_sizes(plan.disk_parts)}"),
        *_pace(plan),
    ]
    console.show_pairs("plan", pairs)
    if plan.timing is not None:
        show_timing(plan.timing)
    for room in (plan.memory, plan.disk):
        for line in room_lines(room):
            console.show_text(line)


def _phase(phase: Phase) -> str:
    return f"{gib(phase.peak_bytes)}: {_sizes(phase.parts)}; then in turn {_sizes(phase.moments)}"


def _sizes(parts: Sequence[Part]) -> str:
    return ", ".join(f"{part.name} {gib(part.size_bytes, unit='')}" for part in parts)


def _pace(plan: CostPlan) -> list[tuple[str, str]]:
    """Say how long a step took here, if one was measured."""
    if plan.pace is None:
        return []
    pace = plan.pace
    return [("measured here", f"{pace.step_seconds_median_s:.2f} s a step, median of {pace.steps} in {pace.variant}")]


def show_timing(timing: Timing) -> None:
    """Show how long each kind of work takes, what decides it, and where the rates come from."""
    rows = [(each.name, duration(each.seconds_s), each.limit, _shares(each.parts_s)) for each in timing.stretches]
    rows.append(("total", duration(timing.total_s), "", ""))
    console.show_rows("time", ("", "at most", "limit", "of it"), rows)
    console.show_text(f"a training step: {timing.step_s:.3g} s; not counted: {', '.join(timing.left_out)}")
    if timing.rates is not None:
        console.show_text(rates_line(timing.rates))


def _shares(parts: Mapping[Any, float]) -> str:
    """Say which part of the time each limit decides, where there are several."""
    total = sum(parts.values())
    shares = {name: round(100 * seconds / total) for name, seconds in parts.items() if total}
    return ", ".join(f"{name} {share} %" for name, share in sorted(shares.items(), key=lambda each: -each[1]) if share)


def rates_line(rates: Rates) -> str:
    """Say which rates were taken, and whether anybody measured them."""
    whose = "measured" if rates.measured else "NOT measured: figures of a vendor or user, shares assumed"
    return (
        f"rates of {rates.name}, {whose}: products {rates.products_per_s / 1e12:.3g} TFLOP/s, "
        f"{100 * rates.reached:.0f} % reached; memory {rates.memory_bytes_per_s / 1e9:.4g} GB/s, "
        f"{100 * rates.memory_reached:.0f} % reached; an operator {1e6 * rates.operator_s:.2g} µs; network "
        f"{rates.network_bytes_per_s / 1e9:.3g} GB/s; disk {rates.disk_bytes_per_s / 1e9:.2g} GB/s"
    )


def room_lines(room: Room) -> list[str]:
    """Say whether there is enough, and what would need less."""
    of = f"{room.name}: {gib(room.needed_bytes)} needed, {gib(room.there_bytes)} there"
    if room.fits:
        return [f"{of}: fits"]
    if room.name == "disk":
        return [f"{of}: does NOT fit", "  distill.keep_last and rollout.keep_states say what is kept, --run where"]
    changes = [
        f"  {' '.join(f'--set {setting}' for setting in each.settings)}: {gib(each.peak_bytes)}"
        + (", fits" if each.peak_bytes <= room.there_bytes else "")
        for each in room.advice
    ]
    return [f"{of}: does NOT fit", *(changes or ["  no setting of this preset makes it smaller"])]
