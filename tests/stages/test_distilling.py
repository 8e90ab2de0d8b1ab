"""What a variant may replay, on the tiny model."""

from pathlib import Path

import pytest

from kdctl import pipeline
from kdctl.errors import StoreError
from kdctl.job import open_job
from kdctl.preset import Preset
from kdctl.resolve import build_preset

LIVE = {"distill.lmbda": 1.0, "distill.refresh_every": 2}


def test_replay_of_a_variant_without_live_rollouts_is_refused_before_any_work(smoke: Preset, tmp_path: Path) -> None:
    preset = build_preset(smoke.model_dump(), LIVE | {"distill.replay": "absent"}, "test")
    job = open_job(preset, tmp_path)
    with pytest.raises(StoreError, match=r"distill\.replay='absent'.*name a finished variant"):
        pipeline.distill(job)
    assert not job.run.student.exists()


def test_replay_with_more_steps_than_were_recorded_names_the_slot(smoke: Preset, tmp_path: Path) -> None:
    preset = build_preset(smoke.model_dump(), LIVE | {"distill.steps": 2}, "test")
    pipeline.distill(open_job(preset, tmp_path), name="first")
    longer = build_preset(preset.model_dump(), {"distill.replay": "first", "distill.steps": 3}, "test")
    slot = 2 * preset.distill.rows_per_step
    with pytest.raises(StoreError, match=rf"variant first generated no rollout for slot {slot};"):
        pipeline.distill(open_job(longer, tmp_path), name="longer")
