"""What a person reads after each stage carries the record's numbers."""

from typing import Any

import pytest

from kdctl.cli import console, render
from kdctl.run.records import (
    DistillReport,
    DistributionMetrics,
    Estimate,
    LayerError,
    QuantizeReport,
    SamplingRecord,
    ShardEntry,
    StoreManifest,
    TextMetrics,
    Versions,
)
from kdctl.sweep.records import SweepReport, TrialRecord

VERSIONS = Versions(kdctl="0", torch="0", transformers="0", compressed_tensors="0")
LAYERS = tuple(LayerError(name=f"layers.{i}", relative_error=0.09 - i / 100, sqnr_db=20.0 + i) for i in range(8))


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.01, high=value + 0.01)


def distribution(kl: float) -> DistributionMetrics:
    return DistributionMetrics(
        forward_kl=estimate(kl),
        reverse_kl=estimate(0.0654),
        top1_agreement=estimate(0.875),
        perplexity=estimate(12.34),
        teacher_perplexity=11.11,
        documents=7,
        tokens=321,
    )


FOLDER: dict[str, Any] = {
    "identity": "a",
    "teacher": "t",
    "bits": 3,
    "group_size": 48,
    "method": "minmax",
    "versions": VERSIONS,
}


def quantize_report(symmetric: bool) -> QuantizeReport:
    return QuantizeReport(
        **FOLDER,
        symmetric=symmetric,
        skip=(),
        teacher_bytes=8 * 2**20,
        student_bytes=3 * 2**20,
        quantized_parameters=1000,
        other_parameters=234,
        layers=LAYERS,
        yardstick="y",
        distribution=distribution(0.0321),
        text=TextMetrics(perplexity=estimate(55.5), tokens=10, documents=1),
        teacher_text=TextMetrics(perplexity=estimate(44.4), tokens=10, documents=1),
        seconds_s=2.0,
    )


@pytest.mark.parametrize(("symmetric", "kind"), [(True, " symmetric"), (False, " asymmetric")])
def test_a_quantized_student_shows_grid_size_and_cost(
    symmetric: bool, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    render.show_quantized(quantize_report(symmetric))
    out, err = capsys.readouterr()
    assert err == ""
    for part in ("3 bits", "group size 48", kind, "minmax", "8.0 MiB → 3.0 MiB (38 %)", "1,000 of 1,234"):
        assert part in out
    for part in ("0.0321 [0.0221, 0.0421]", "87.5 %", "12.34 (teacher 11.11)", "55.50 (teacher 44.40)", "321", "7 doc"):
        assert part in out


def test_only_the_worst_layers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    render.show_quantized(quantize_report(True))
    out = capsys.readouterr().out
    assert [layer.name in out for layer in LAYERS] == [index < render.WORST for index in range(len(LAYERS))]
    assert "9.00 %" in out


SAMPLING = SamplingRecord(temperature=0.7, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=8, seed=5)


@pytest.mark.parametrize(
    ("sampling", "part", "masked"),
    [
        (None, "from a data set", False),
        (SAMPLING, "temperature 0.7, seed 5", False),
        (SAMPLING.model_copy(update={"min_new_tokens": 4}), "first 4 tokens", True),
    ],
)
def test_a_store_shows_its_size_and_how_it_was_sampled(
    sampling: SamplingRecord | None, part: str, masked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tuple(ShardEntry(file=f"{i}", rows=4, completion_tokens=30, sha256="x") for i in range(2))
    render.show_store(StoreManifest(source="teacher", identity="a", writer="w", sampling=sampling, shards=shards))
    out = capsys.readouterr().out
    for expected in ("rollouts/teacher", "8 in 2 shards", "60 (7.5 a completion)", part):
        assert expected in out
    assert ("masked" in out) == masked


def test_examples_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    render.show_examples([("[bold]hi[/bold]", "first\nsecond"), ("two", "")])
    out = capsys.readouterr().out
    assert "[bold]hi[/bold]" in out
    assert "first\nsecond" in out
    assert out.count("--- completion") == 2


def test_a_distilled_student_shows_what_was_removed(capsys: pytest.CaptureFixture[str]) -> None:
    report = DistillReport(
        **FOLDER,
        symmetric=False,
        variant="lambda1_beta1",
        settings={},
        student="s",
        stores={},
        before=distribution(0.0808),
        after=distribution(0.0404),
        removed=Estimate(value=0.5, low=0.402, high=0.61),
        final_loss=0.1,
        steps=64,
        train_seconds_s=10.0,
        step_seconds_median_s=0.25,
        completion_tokens_trained=4321,
    )
    render.show_distilled(report)
    out = capsys.readouterr().out
    for part in ("lambda1_beta1", "64 steps", "4321 completion tokens", "0.25 s a step", "0.0808", "0.0404"):
        assert part in out
    assert "50.0 % [40.2, 61.0]" in out
    assert "kept" not in out
    render.show_distilled(report.model_copy(update={"kept_step": 40, "stopped": "patience"}))
    assert "the student after step 40; training stopped because no new low" in capsys.readouterr().out


@pytest.mark.parametrize(("digits", "text"), [(4, "0.1235 [0.1135, 0.1335]"), (1, "0.1 [0.1, 0.1]")])
def test_an_interval_has_the_asked_digits(digits: int, text: str) -> None:
    assert render.interval(estimate(0.12345), digits) == text
    assert "0.0000" not in render.interval(estimate(3.2e-5))


def trial(number: int, status: Any, **more: Any) -> TrialRecord:
    values = {"distill.beta": number / 4, "distill.train": "lora"}
    return TrialRecord(number=number, values=values, status=status, variant=f"beta{number}", steps=10, **more)


SWEEP = SweepReport(
    sweep="mine",
    folder="runs/mine",
    metric="eval/forward_kl",
    goal="minimize",
    trials=(
        trial(0, "complete", metric=0.25, step=10, seconds_s=100.0),
        trial(1, "complete", metric=0.125, step=10, seconds_s=300.0),
        trial(2, "running", step=4, left_s=50.0),
        trial(3, "failed", step=2),
        trial(4, "waiting"),
    ),
    best="beta1",
)


def test_a_sweep_shows_values_status_metric_and_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    render.show_sweep(SWEEP)
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["0", "0", "lora", "complete", "10/10", "", "0.2500", "beta0"],
        ["1", "0.25", "lora", "complete (best)", "10/10", "", "0.1250", "beta1"],
        ["2", "0.5", "lora", "running", "4/10", "50 s", "", "beta2"],
        ["3", "0.75", "lora", "failed", "2/10", "", "", "beta3"],
        ["4", "1", "lora", "waiting", "0/10", "", "", "beta4"],
    ]
    assert "kdctl report --run runs/mine" in out


def test_the_time_left_is_that_of_the_steps_left() -> None:
    assert render.time_left(SWEEP) == ", about 5 min left"  # 6 + 10 steps of 20 s
    twice = SWEEP.model_copy(update={"trials": (*SWEEP.trials, trial(5, "running", step=10))})
    assert render.time_left(twice) == ", about 3 min left"
    assert render.time_left(SWEEP.model_copy(update={"trials": SWEEP.trials[:2]})) == ""
    assert render.time_left(SWEEP.model_copy(update={"trials": SWEEP.trials[2:]})) == ""


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 MiB"),
        (7000, "0.0067 MiB"),
        (2**20, "1 MiB"),
        (9 * 2**20, "9 MiB"),
        (11 * 2**20, "0.01 GiB"),
        (3 * 2**30, "3.00 GiB"),
    ],
)
def test_sizes_are_not_written_as_zeros(size: int, text: str) -> None:
    assert render.gib(size) == text


def test_durations_are_those_that_people_say() -> None:
    assert [render.duration(seconds) for seconds in (0.123, 5.4, 89, 600, 7200)] == [
        "0.12 s",
        "5.4 s",
        "89 s",
        "10 min",
        "2.0 h",
    ]


def test_control_characters_of_texts_and_names_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    title, clear, turned = "\x1b]0;title\x07", "\x1b[2J\x9b1m\r\b", "\u202eevil\u2066"
    render.show_examples([(title + clear, turned + "naïve\t東京 👩\u200d🚀\u00a0!\n")])
    console.show_rows(title, ("name", "value"), [(clear, turned)])
    console.show_pairs("t", [(title, clear)])
    out = capsys.readouterr().out
    assert {c for c in out if not c.isprintable()} <= {"\n", "\t", "\u00a0", "\u200d"}
    assert "naïve\t東京 👩\u200d🚀\u00a0!\n" in out
    assert "\\x1b]0;title\\x07\\x1b[2J" in out


def test_a_layer_of_zeros_has_no_relative_error(capsys: pytest.CaptureFixture[str]) -> None:
    zero = LayerError(name="layers.zero", relative_error=None, sqnr_db=None)
    render.show_quantized(quantize_report(symmetric=True).model_copy(update={"layers": (zero,)}))
    assert [cell.strip() for cell in capsys.readouterr().out.split("layers.zero")[1].split("│")[1:3]] == ["–", "–"]


def test_a_layer_that_lost_nothing_has_no_ratio_of_decibels(capsys: pytest.CaptureFixture[str]) -> None:
    exact = LayerError(name="layers.exact", relative_error=0.0, sqnr_db=600.0)
    render.show_quantized(quantize_report(symmetric=True).model_copy(update={"layers": (exact,)}))
    assert [cell.strip() for cell in capsys.readouterr().out.split("layers.exact")[1].split("│")[1:3]] == [
        "0.00 %",
        "inf",
    ]
