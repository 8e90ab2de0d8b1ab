"""What a variant may replay, on the tiny model."""

from pathlib import Path

import pytest
import torch

from kdctl.base.errors import StoreError
from kdctl.base.progress import Silent
from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.formats.student import load_student
from kdctl.run.files import remove
from kdctl.stages import pipeline
from kdctl.stages.context import open_run

LIVE = {"distill.lmbda": 1.0, "distill.refresh_every": 2}


class Notes(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        """Keep a line."""
        self.said.append(text)


def test_replay_of_a_variant_without_live_rollouts_is_refused_before_any_work(smoke: Preset, tmp_path: Path) -> None:
    preset = build_preset(smoke.model_dump(), LIVE | {"distill.replay": "absent"}, "test")
    job = open_run(preset, tmp_path)
    with pytest.raises(StoreError, match=r"distill\.replay='absent'.*name a finished variant"):
        pipeline.distill(*job)
    assert not job.context.paths.student.exists()


@pytest.mark.slow
def test_replay_with_more_steps_than_were_recorded_names_the_slot(smoke: Preset, tmp_path: Path) -> None:
    preset = build_preset(smoke.model_dump(), LIVE | {"distill.steps": 2}, "test")
    pipeline.distill(*open_run(preset, tmp_path), name="first")
    longer = build_preset(preset.model_dump(), {"distill.replay": "first", "distill.steps": 3}, "test")
    slot = 2 * preset.distill.rows_per_step
    with pytest.raises(StoreError, match=rf"variant first generated no rollout for slot {slot};"):
        pipeline.distill(*open_run(longer, tmp_path), name="longer")


@pytest.mark.slow
def test_an_early_stop_leaves_the_student_that_fewer_steps_leave(smoke: Preset, tmp_path: Path) -> None:
    constant = {"distill.lr": 0.01, "distill.schedule": "constant", "distill.warmup_ratio": 0.0, "distill.steps": 30}
    early = {
        "distill.stop_early": True,
        "distill.patience": 1,
        "distill.heldout_every": 1,
        "distill.heldout_documents": 4,
    }
    preset = build_preset(smoke.model_dump(), constant | early, "test")
    job = open_run(preset, tmp_path)
    report = pipeline.distill(*job, name="early")
    assert report.kept_step is not None
    # which rule ends it first is the machine's rounding
    assert (report.stopped, report.steps) in {("patience", report.kept_step + 1), ("settled", report.kept_step)}
    assert report.steps < preset.distill.steps
    assert (
        f"{report.kept_step} steps, learning rate 0.01"
        in (job.context.paths.variant("early").final / "README.md").read_text()
    )
    fewer = build_preset(smoke.model_dump(), constant | {"distill.steps": report.kept_step}, "test")
    straight = pipeline.distill(*open_run(fewer, tmp_path), name="straight")
    assert (straight.stopped, straight.kept_step) == ("steps", report.kept_step)
    assert straight.after == report.after
    kept, other = (
        load_student(job.context.paths.variant(name).final, job.teacher.device).weights
        for name in ("early", "straight")
    )
    assert all(torch.equal(weight.codes, other[name].codes) for name, weight in kept.items())


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "harmful"), [(1.0, True), (1e-3, False)])
def test_training_that_only_does_harm_is_said(smoke: Preset, tmp_path: Path, lr: float, harmful: bool) -> None:
    notes = Notes()
    preset = build_preset(smoke.model_dump(), {"distill.lr": lr, "distill.steps": 3}, "test")
    report = pipeline.distill(*open_run(preset, tmp_path, reporter=notes))
    assert (report.removed.value < 0) == harmful
    assert any(text.startswith("warning: the student is farther") for text in notes.said) == harmful


@pytest.mark.slow
def test_training_says_that_the_offsets_of_its_student_are_gone(smoke: Preset, tmp_path: Path) -> None:
    notes = Notes()
    preset = build_preset(smoke.model_dump(), {"quantize.method": "kl", "distill.steps": 1}, "test")
    job = open_run(preset, tmp_path, reporter=notes)
    pipeline.distill(*job, name="with")
    assert not any("middle of their cells" in one for one in notes.said)
    remove(job.context.paths.offsets)
    pipeline.distill(*job, name="without")
    assert sum("middle of their cells" in one for one in notes.said) == 1
