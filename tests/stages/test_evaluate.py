"""Distances to the teacher on teacher-written, student-written and plain text, against naive float64 computations."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_up import known
from transformers import PreTrainedModel

from kdctl.base.errors import StoreError
from kdctl.base.progress import Silent
from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.formats.student import load_student
from kdctl.model.folder import fingerprint
from kdctl.rollout.store import RolloutStore
from kdctl.run.records import DistributionMetrics, EvalResult, Rollout
from kdctl.stages import pipeline
from kdctl.stages.context import Run, open_run
from kdctl.stages.yardstick import ensure_measuring


@pytest.fixture
def brief(smoke: Preset) -> Preset:
    """Return the smoke preset with a shorter yardstick and hardly any training."""
    heldout = {"heldout.num_prompts": 8, "heldout.max_new_tokens": 12, "heldout.min_completion_tokens": 50}
    changes = heldout | {"heldout.text_tokens": 256, "heldout.prompts_per_block": 4, "distill.steps": 1}
    return build_preset(smoke.model_dump(), changes, "test")


@pytest.fixture
def exact(brief: Preset, tiny_dir_fp32: Path) -> Preset:
    """Return the smoke preset in float32, with 3 bits, so that distances are large beside rounding errors."""
    changes = {"teacher.model": str(tiny_dir_fp32), "teacher.dtype": "float32", "quantize.bits": 3}
    return build_preset(brief.model_dump(), changes | {"quantize.method": "minmax"}, "test")


@torch.no_grad()
def naive(teacher: PreTrainedModel, student: PreTrainedModel, prompt: list[int], completion: list[int]) -> list[float]:
    """Compute a document's sums in the order of the tables."""
    ids = torch.tensor([prompt + completion])
    p, q = (model(ids).logits[0, len(prompt) - 1 : -1].double().softmax(-1) for model in (teacher, student))
    at = torch.tensor(completion).unsqueeze(-1)
    sums = [
        (p * (p.log() - q.log())).sum(),
        (q * (q.log() - p.log())).sum(),
        (p.argmax(-1) == q.argmax(-1)).sum(),
        -q.gather(-1, at).log().sum(),
        -p.gather(-1, at).log().sum(),
    ]
    return [len(completion), *map(float, sums)]


def table(job: Run, model: str, kind: str) -> dict[str, list]:
    return pq.read_table(job.context.paths.eval(model) / "samples" / f"{kind}.parquet").to_pydict()


def own(job: Run, model: str) -> dict[str, Rollout]:
    """Read what a model wrote itself, by prompt."""
    return {r.prompt_id: r for r in RolloutStore(job.context.paths.eval(model) / "rollouts").read()}


def evaluated(preset: Preset, folder: Path, force: bool = False) -> tuple[Run, dict[str, EvalResult]]:
    job = open_run(preset, folder)
    pipeline.quantize(*job)
    return job, pipeline.evaluate(*job, force=force)


def test_student_written_and_text_tables_are_those_of_a_naive_computation(exact: Preset, tmp_path: Path) -> None:
    job, results = evaluated(exact, tmp_path)
    student, written = load_student(job.context.paths.student, torch.device("cpu")).model, own(job, "ptq")
    found = table(job, "ptq", "student_written")
    documents = {
        "student_written": [(written[name].prompt_ids, written[name].completion_ids) for name in found["prompt_id"]],
        "text": [(ids[:1], ids[1:]) for ids in ensure_measuring(*job).text()],
    }
    for kind, pairs in documents.items():
        columns = table(job, "ptq", kind)
        columns.pop("prompt_id", None)
        reference = np.array([naive(job.teacher.load(), student, *pair) for pair in pairs]).T
        np.testing.assert_allclose(list(columns.values()), reference, rtol=1e-4, atol=1e-4, err_msg=kind)
    summary = results["ptq"].student_written
    assert summary is not None
    assert known(summary.reverse_kl).value == pytest.approx(sum(found["reverse_kl"]) / sum(found["tokens"]))
    assert summary.forward_kl.low < summary.forward_kl.value < summary.forward_kl.high


def test_the_student_writes_like_the_yardstick_was_written(exact: Preset, tmp_path: Path) -> None:
    job, _ = evaluated(exact, tmp_path)
    held, store = RolloutStore(job.context.paths.heldout), RolloutStore(job.context.paths.eval("ptq") / "rollouts")
    assert store.manifest().sampling == held.manifest().sampling
    assert store.manifest().writer == fingerprint(job.context.paths.student)
    pairs = list(zip(held.read(), store.read(), strict=True))
    assert all(a.prompt_ids == b.prompt_ids and b.source == "student" for a, b in pairs)
    assert any(a.completion_ids != b.completion_ids for a, b in pairs)
    likelihoods = {name: -sum(r.logprobs or []) for name, r in own(job, "ptq").items()}
    found = table(job, "ptq", "student_written")
    np.testing.assert_allclose(found["nll"], [likelihoods[name] for name in found["prompt_id"]], rtol=1e-4)


def test_the_teachers_own_completions_are_the_yardstick(brief: Preset, tmp_path: Path) -> None:
    job, results = evaluated(brief, tmp_path)
    teacher = results["teacher"]
    assert teacher.student_written == teacher.distribution
    assert not (job.context.paths.eval("teacher") / "rollouts").exists()
    for summary in (teacher.distribution, teacher.text_distribution):
        assert summary is not None
        assert summary.forward_kl.value == known(summary.reverse_kl).value == 0
        assert summary.perplexity.value == pytest.approx(summary.teacher_perplexity)
    assert next(iter(table(job, "ptq", "heldout"))) == "prompt_id"


@pytest.mark.slow
def test_text_perplexity_is_the_same_wherever_it_stands(brief: Preset, tmp_path: Path) -> None:
    job, results = evaluated(brief, tmp_path)
    stated = ensure_measuring(*job).teacher_text()
    for result in results.values():
        assert isinstance(result.text_distribution, DistributionMetrics)
        assert result.text_distribution.perplexity == result.text.perplexity
        assert result.text_distribution.teacher_perplexity == pytest.approx(stated.perplexity.value)
    assert results["ptq"].text == pipeline.quantize(*job).text

    job.context.paths.samples("ptq", "text").unlink()  # a table that is lost is measured again
    again = pipeline.evaluate(*job)
    assert job.context.paths.samples("ptq", "text").exists()
    assert again["teacher"] == results["teacher"]
    assert again["ptq"].samples == results["ptq"].samples


@pytest.mark.slow
def test_a_variant_and_a_model_made_elsewhere_write_their_own(brief: Preset, tiny_dir: Path, tmp_path: Path) -> None:
    job = open_run(brief, tmp_path / "run")
    pipeline.distill(*job, name="mine")
    copy = shutil.copytree(tiny_dir, tmp_path / "copy")
    results = pipeline.evaluate(*job, also=pipeline.open_foreign(*job, "copy", str(copy)))
    same = results["copy"].student_written
    assert same is not None
    assert same.forward_kl.value == 0
    # equal weights draw equal tokens, because the random numbers are those of the yardstick
    assert [r.completion_ids for r in own(job, "copy").values()] == [
        r.completion_ids for r in RolloutStore(job.context.paths.heldout).read()
    ]
    assert own(job, "mine") != own(job, "ptq")
    assert RolloutStore(job.context.paths.eval("mine") / "rollouts").manifest().writer == results["mine"].weights


@pytest.mark.slow
def test_completions_are_kept_for_the_next_evaluation_and_written_again_for_other_weights(
    brief: Preset, tiny_dir: Path, tmp_path: Path
) -> None:
    job, _ = evaluated(brief, tmp_path / "run")
    shard = job.context.paths.eval("ptq") / "rollouts" / "shard-00000.arrow"
    before = shard.stat().st_mtime_ns
    other = build_preset(brief.model_dump(), {"eval.batch_size": 3}, "test")
    evaluated(other, tmp_path / "run")
    assert shard.stat().st_mtime_ns == before
    shutil.copytree(job.context.paths.eval("ptq") / "rollouts", job.context.paths.eval("copy") / "rollouts")
    pipeline.evaluate(*job, also=pipeline.open_foreign(*job, "copy", str(tiny_dir)))
    assert RolloutStore(job.context.paths.eval("copy") / "rollouts").manifest().writer == job.teacher.fingerprint()


@pytest.mark.slow
def test_student_written_completions_can_be_left_out(brief: Preset, tmp_path: Path) -> None:
    off = build_preset(brief.model_dump(), {"eval.student_written": False}, "test")
    job, results = evaluated(off, tmp_path)
    assert [result.student_written for result in results.values()] == [None, None]
    for name in results:
        assert not (job.context.paths.eval(name) / "rollouts").exists()
        assert not (job.context.paths.eval(name) / "samples" / "student_written.parquet").exists()
    assert all(evaluated(brief, tmp_path)[1][name].student_written for name in results)


class Notes(Silent):
    """Keep what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_samples_that_nobody_writes_are_said_to_have_no_effect(brief: Preset, tmp_path: Path) -> None:
    changes = {"eval.samples": 2, "eval.temperature": 1.0, "eval.student_written": False}
    notes = Notes()
    job = open_run(build_preset(brief.model_dump(), changes, "test"), tmp_path, reporter=notes)
    pipeline.evaluate(*job, names=["teacher"])
    assert [line for line in notes.lines if "eval.samples and eval.temperature have no effect" in line]


@pytest.mark.slow
def test_students_are_asked_by_the_margins_of_a_teacher_that_answered_everything(brief: Preset, tmp_path: Path) -> None:
    changes = {"eval.tasks": ["arc_easy_offline"], "eval.limit": 20, "eval.student_written": False}
    whole = build_preset(brief.model_dump(), changes, "test")
    some = build_preset(whole.model_dump(), {"eval.allocation": "margin", "eval.near": 0.3, "eval.far": 0.2}, "test")
    job = open_run(some, tmp_path)
    found = pipeline.evaluate(*job, names=["ptq"])["ptq"].tasks["arc_easy_offline"]
    assert (found.asked, found.items) == (9, 20)
    made = (tmp_path / "eval" / "teacher" / "results.json").read_bytes()
    items = pq.read_table(job.context.paths.samples("ptq", "arc_easy_offline"))
    assert sorted(set(items["weight"].to_pylist())) == pytest.approx([0, 1, 14 / 3])
    full = pipeline.evaluate(*open_run(whole, tmp_path))
    assert (tmp_path / "eval" / "teacher" / "results.json").read_bytes() == made  # what it answered serves both
    assert full["ptq"].tasks["arc_easy_offline"].asked is None
    path = job.context.paths.samples("teacher", "arc_easy_offline")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="not the file that the results were computed from"):
        pipeline.evaluate(*open_run(some, tmp_path), names=["ptq"])
