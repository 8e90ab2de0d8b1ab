"""Students on the PTQ student's text: one text for all, added to results that lack it."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.rollout.store import RolloutStore
from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import EvalResult
from kdctl.stages import pipeline
from kdctl.stages.context import Run, open_run
from kdctl.stages.yardstick import ensure_measuring


@pytest.fixture
def brief(smoke: Preset) -> Preset:
    """Return the smoke preset with a shorter yardstick and hardly any training."""
    changes = {"heldout.num_prompts": 8, "heldout.max_new_tokens": 12, "heldout.min_completion_tokens": 50}
    changes |= {"heldout.text_tokens": 256, "heldout.prompts_per_block": 4, "distill.steps": 1, "distill.lr": 0.01}
    return build_preset(smoke.model_dump(), changes, "test")


def results(job: Run, name: str) -> EvalResult:
    return read_record(job.context.paths.eval(name) / "results.json", EvalResult)


def forget(job: Run, name: str) -> EvalResult:
    """Make results be what they were before this text was measured; return them as they were."""
    found = results(job, name)
    samples = {file: value for file, value in found.samples.items() if file != "ptq_written.parquet"}
    older = found.model_copy(update={"ptq_written": None, "ptq_text": None, "samples": samples})
    write_record(job.context.paths.eval(name) / "results.json", older)
    (job.context.paths.eval(name) / "samples" / "ptq_written.parquet").unlink()
    return found


def test_a_variant_is_measured_on_what_the_ptq_student_wrote_and_old_results_gain_it(
    brief: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = open_run(brief, tmp_path)
    pipeline.distill(*job, name="mine")
    found = pipeline.evaluate(*job)
    store = RolloutStore(job.context.paths.eval("ptq") / "rollouts")
    samples = job.context.paths.eval("mine") / "samples"
    table = pq.read_table(samples / "ptq_written.parquet").to_pydict()
    wrote = {row.prompt_id: len(row.completion_ids) for row in store.read()}
    assert dict(zip(table["prompt_id"], table["tokens"], strict=True)) == wrote
    # what the PTQ student is on its own text it is on this one; another student is not
    assert found["ptq"].ptq_written == found["ptq"].student_written
    assert found["mine"].ptq_written not in (found["mine"].student_written, found["ptq"].ptq_written)
    assert found["teacher"].ptq_written is None
    assert {found[name].ptq_text for name in ("ptq", "mine")} == {store.fingerprint()}

    forget(job, "mine")
    monkeypatch.setattr("kdctl.stages.evaluate._evaluate_one", lambda *_: pytest.fail("evaluated anew"))
    assert pipeline.evaluate(*job, names=["mine"])["mine"] == found["mine"]
    (samples / "ptq_written.parquet").unlink()
    assert pipeline.evaluate(*job, names=["mine"])["mine"] == found["mine"]
    assert (samples / "ptq_written.parquet").exists()
    monkeypatch.setattr("kdctl.stages.ptq_text.PtqText", lambda *_: pytest.fail("measured anew"))
    assert pipeline.evaluate(*job) == found


def test_the_text_is_written_for_a_variant_evaluated_alone_and_not_where_students_write_nothing(
    brief: Preset, tmp_path: Path
) -> None:
    job = open_run(brief, tmp_path)
    pipeline.distill(*job, name="mine")
    alone = pipeline.evaluate(*job, names=["mine"])["mine"]
    assert alone.ptq_written is not None
    assert not (job.context.paths.eval("ptq") / "results.json").exists()
    held = ensure_measuring(*job).completions()
    written = RolloutStore(job.context.paths.eval("ptq") / "rollouts").read()
    assert [row.prompt_ids for row in written] == [row.prompt_ids for row in held]
    off = open_run(build_preset(brief.model_dump(), {"eval.student_written": False}, "test"), tmp_path)
    assert pipeline.evaluate(*off, names=["mine"])["mine"].ptq_written is None


def test_another_ptq_student_writes_another_text(brief: Preset, tmp_path: Path) -> None:
    job = open_run(brief, tmp_path)
    pipeline.quantize(*job)
    first = pipeline.evaluate(*job, names=["ptq"])["ptq"]
    path = job.context.paths.eval("ptq") / "results.json"
    write_record(path, first.model_copy(update={"ptq_text": "of another student"}))
    assert pipeline.evaluate(*job, names=["ptq"])["ptq"] == first
