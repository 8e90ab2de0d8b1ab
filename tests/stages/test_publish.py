"""What is in memory when a new student folder is proven, on the tiny model."""

import gc
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.formats import verify
from kdctl.formats.proof import prove
from kdctl.formats.student import Student
from kdctl.stages import pipeline
from kdctl.stages.context import open_run


def _living() -> list[object]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), PreTrainedModel)]


@pytest.mark.slow
@pytest.mark.parametrize("train", ["weights", "lora", "scales"])
def test_no_model_but_the_teacher_and_the_student_is_in_memory_during_the_proof(
    smoke: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str
) -> None:
    preset = build_preset(smoke.model_dump(), {"distill.train": train, "distill.steps": 1}, "test")
    job = open_run(preset, tmp_path)
    held, found = _living(), []

    def looked(folder: Path, student: Student) -> str:
        said = prove(folder, student)
        teacher = [job.teacher.load()] if job.teacher.loaded else []  # quantize has let go of it
        own = [*held, *teacher, *(part for one in teacher for part in one.modules()), *student.model.modules()]
        found.append([thing for thing in _living() if not any(thing is other for other in own)])
        return said

    monkeypatch.setattr(verify, "prove", looked)
    pipeline.distill(*job, name="one")
    assert found == [[], []], "of quantize and of distill"
