"""What is said, and refused, before training starts."""

import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from kdctl import stats
from kdctl.base.errors import TrainingError
from kdctl.base.progress import Silent
from kdctl.cli import app as cli
from kdctl.config.preset import Preset
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import EvalResult, TaskScore
from kdctl.stages import pipeline
from kdctl.stages.context import Run, open_run
from kdctl.stages.gate import accuracy_gap

Answers = dict[str, dict[str, bool]]


class Notes(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def opened(preset: Preset, folder: Path) -> tuple[Run, list[str]]:
    notes = Notes()
    return open_run(preset, folder, reporter=notes), notes.lines


def answer(job: Run, model: str, answers: Answers, cluster: int = 0) -> None:
    """Put made-up answers by task and item into a model's evaluation; so many items in a row are a cluster."""
    folder = job.context.paths.eval(model)
    score = TaskScore(version="1", metric="acc", value=0.5, stderr=0.1, items=2, num_fewshot=0, metrics={})
    result = read_record(folder / "results.json", EvalResult)
    write_record(folder / "results.json", result.model_copy(update={"tasks": dict.fromkeys(answers, score)}))
    for task, items in answers.items():
        labels = [f"{task} {place // cluster}" if cluster else task for place in range(len(items))]
        columns = {"subtask": [task] * len(items), "cluster": labels, "doc_index": list(range(len(items)))}
        table = pa.table({"item_id": list(items), "acc": list(items.values()), **columns})
        pq.write_table(table, folder / "samples" / f"{task}.parquet")


def items(count: int, wrong: int) -> dict[str, bool]:
    return {f"i{item:03d}": item >= wrong for item in range(count)}


@pytest.fixture
def evaluated(smoke: Preset, tmp_path: Path) -> tuple[Run, list[str]]:
    """Return a job whose teacher and PTQ student are evaluated, and what it says."""
    job, lines = opened(smoke, tmp_path / "run")
    pipeline.quantize(*job)
    pipeline.evaluate(*job)
    lines.clear()
    return job, lines


@pytest.mark.slow
def test_the_gap_is_said_before_training(smoke: Preset, tmp_path: Path) -> None:
    job, lines = opened(smoke, tmp_path)
    report = pipeline.distill(*job)
    said = [line for line in lines if line.startswith("PTQ gap")]
    kl, perplexity = report.before.forward_kl, report.before.perplexity.value
    assert len(said) == 1
    assert f"{kl.value:.4g} [{kl.low:.4g}, {kl.high:.4g}] nats a token" in said[0]
    assert f"from {perplexity:.2f} to {report.before.teacher_perplexity:.2f}" in said[0]
    assert lines.index(said[0]) < lines.index("no teacher rollouts yet: making them first")
    assert not [line for line in lines if line.startswith("warning")]
    lines.clear()
    pipeline.distill(*job, min_gap=1e9)
    assert [line.split(":")[0] for line in lines] == ["distill"]


@pytest.mark.slow
def test_a_gap_below_the_asked_one_stops_before_any_work(smoke: Preset, tmp_path: Path) -> None:
    job, _ = opened(smoke, tmp_path)
    low = pipeline.quantize(*job).distribution.forward_kl.low
    with pytest.raises(TrainingError, match=rf"--min-gap {math.nextafter(low, 1):g} asks"):
        pipeline.distill(*job, min_gap=math.nextafter(low, 1))
    assert not job.context.paths.rollouts("teacher").exists()
    assert not job.context.paths.distill_root.exists()
    report = pipeline.distill(*job, min_gap=low)
    final = job.context.paths.variant(report.variant).final
    with pytest.raises(TrainingError, match="lower end"):
        pipeline.distill(*job, force=True, min_gap=9.0)
    assert final.exists()


def test_the_command_exits_2_with_one_message(smoke: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    open_run(smoke, tmp_path)
    done = CliRunner().invoke(cli.app, ["distill", "--run", str(tmp_path), "--min-gap", "50"])
    assert done.exit_code == 2
    assert "PTQ gap: KL to the teacher" in done.stderr
    assert done.stderr.count("--min-gap 50 asks for a lower end") == 1
    assert CliRunner().invoke(cli.app, ["distill", "--run", str(tmp_path), "--min-gap", "-1"]).exit_code == 2


@pytest.mark.slow
def test_the_accuracy_gap_is_that_of_the_items_of_both(evaluated: tuple[Run, list[str]]) -> None:
    job, lines = evaluated
    assert accuracy_gap(*job) is None
    answer(job, "teacher", {"a": items(300, 30), "b": items(200, 50), "teacher_only": items(5, 1)})
    answer(job, "ptq", {"a": items(260, 90), "b": items(200, 100)})
    found = accuracy_gap(*job)
    ptq, teacher = ({"a": items(260, k), "b": items(200, n)} for k, n in ((90, 100), (30, 50)))
    pairs = {task: stats.Paired(list(ptq[task].values()), list(teacher[task].values())) for task in ptq}
    assert found is not None
    assert found == stats.compare_average(pairs)
    assert found.difference.value == pytest.approx((60 / 260 + 50 / 200) / 2)
    pipeline.distill(*job)
    assert any(line.startswith("PTQ gap: teacher − ptq +24.04 [") and "460 items" in line for line in lines)
    assert not [line for line in lines if line.startswith("warning")]


@pytest.mark.slow
def test_the_accuracy_gap_knows_items_that_are_not_independent(evaluated: tuple[Run, list[str]]) -> None:
    job, _ = evaluated
    gaps = []
    for cluster in (0, 10):
        answer(job, "teacher", {"a": items(300, 30)}, cluster)
        answer(job, "ptq", {"a": items(300, 90)}, cluster)
        gaps.append(accuracy_gap(*job))
    alone, together = (gap.difference for gap in gaps if gap is not None)
    assert together.value == alone.value
    assert together.high - together.low > 2 * (alone.high - alone.low)


@pytest.mark.slow
def test_an_accuracy_gap_within_noise_warns(evaluated: tuple[Run, list[str]]) -> None:
    job, lines = evaluated
    answer(job, "teacher", {"a": items(100, 40)})
    answer(job, "ptq", {"a": items(100, 41)})
    pipeline.distill(*job)
    assert [line for line in lines if line.startswith("warning: the accuracy gap is within noise")]


def test_results_of_other_weights_say_nothing(evaluated: tuple[Run, list[str]]) -> None:
    job, _ = evaluated
    for model in ("teacher", "ptq"):
        answer(job, model, {"a": items(9, 4)})
    assert accuracy_gap(*job) is not None
    path = job.context.paths.eval("ptq") / "results.json"
    write_record(path, read_record(path, EvalResult).model_copy(update={"weights": "other"}))
    assert accuracy_gap(*job) is None


@pytest.mark.slow
def test_a_kl_within_noise_warns(smoke: Preset, tmp_path: Path) -> None:
    from kdctl.config.resolve import build_preset

    close = {"quantize.bits": 8, "quantize.symmetric": True, "quantize.group_size": 8}
    job, lines = opened(build_preset(smoke.model_dump(), close, "test"), tmp_path)
    assert pipeline.quantize(*job).distribution.forward_kl.low < 1e-3
    pipeline.distill(*job)
    assert [line for line in lines if line.startswith("warning: this KL is within noise")]
