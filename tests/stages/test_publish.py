"""What is in memory when a new student folder is verified, on the tiny model."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.formats.verify import accept
from kdctl.stages import pipeline, publish
from kdctl.stages.context import open_run


def _living() -> list[object]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), PreTrainedModel)]


@pytest.mark.slow
@pytest.mark.parametrize("train", ["weights", "lora", "scales"])
def test_the_student_is_gone_from_memory_when_its_folder_is_verified(
    smoke: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str
) -> None:
    preset = build_preset(smoke.model_dump(), {"distill.train": train, "distill.steps": 1}, "test")
    job = open_run(preset, tmp_path)
    held, found = [job.teacher.load(), *_living()], []

    def looked(pending: Path, folder: Path, teacher: publish.Original, device: torch.device) -> None:
        found.append([thing for thing in _living() if not any(thing is other for other in held)])
        assert device == torch.device("cpu")
        accept(pending, folder, teacher, device)

    monkeypatch.setattr(publish, "accept", looked)
    pipeline.distill(*job, name="one")
    assert found == [[], []], "of quantize and of distill"
