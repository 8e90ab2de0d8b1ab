"""Stores of a run: what exceeds the teacher's context is refused before any work, or cut and counted."""

import json
import shutil
from pathlib import Path

import pytest

from kdctl.base.errors import PresetError, StoreError
from kdctl.base.progress import Silent
from kdctl.config.preset import Preset
from kdctl.model.teacher import Teacher
from kdctl.rollout.store import RolloutStore
from kdctl.stages import pipeline
from kdctl.stages.context import open_run

CONTEXT = 96


class Notes(Silent):
    """Keep what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def short(tiny_dir: Path, tmp_path: Path, smoke: Preset) -> Preset:
    """Return a preset on a teacher of a short context, and prompts with answers that do not all fit in it."""
    folder = shutil.copytree(tiny_dir, tmp_path / "short")
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**tree, "max_position_embeddings": CONTEXT}))
    answers = [{"role": "assistant", "content": "answer " * (1 + 14 * (i % 2))} for i in range(8)]
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, answers[i]]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps({"prompt": f"held {i}"}) for i in range(8)))
    tree = smoke.model_dump()
    tree["teacher"]["model"] = str(folder)
    tree["prompts"] |= {"train": str(tmp_path / "rows.jsonl"), "heldout": str(tmp_path / "held.jsonl")}
    tree["rollout"] |= {"max_new_tokens": 80, "num_prompts": 8}
    return Preset.model_validate(tree)


def test_answers_are_cut_where_the_context_ends(short: Preset, tmp_path: Path) -> None:
    notes = Notes()
    run = open_run(short, tmp_path / "run", reporter=notes)
    pipeline.rollout(*run, "dataset")
    found = RolloutStore(run.context.paths.rollouts("dataset")).read()
    lengths = [len(one.prompt_ids) + len(one.completion_ids) for one in found]
    assert max(lengths) == CONTEXT
    cut = sum(length == CONTEXT for length in lengths)
    assert [line for line in notes.lines if line.startswith(f"{cut} answers cut at {CONTEXT} tokens")]


def test_completions_beyond_the_context_are_refused_before_the_teacher_is_loaded(
    short: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Teacher, "load", lambda _: pytest.fail("the teacher was loaded"))
    run = open_run(short, tmp_path / "run")
    with pytest.raises(PresetError, match=r"rollout\.max_new_tokens=80 make \d+, and the network's context is 96"):
        pipeline.run_all(*run)


def trained_name(run: Path) -> str:
    """Return the name of the variant that was trained without a mix."""
    return next(path.name for path in (run / "distill").iterdir() if "_mix-" not in path.name)


def test_each_mix_has_its_own_stores_and_all_share_the_student(
    smoke: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is calibrated on the preset's own weights, whichever mix comes first."""
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps({"body": f"text number {i}"}) for i in range(40)))
    tree = smoke.model_dump()
    tree["quantize"] |= {"method": "gptq", "calibration_sequences": 8}
    tree["distill"] |= {"lmbda": 0.0, "refresh_every": 0}
    plain = {"source": str(tmp_path / "plain.jsonl"), "columns": {"text": "body"}}
    tree["prompts"]["train"] = [{"source": "kdctl"}, plain]

    def trained(mix: str | None) -> list[str]:
        preset = Preset.model_validate({**tree, "prompts": {**tree["prompts"], "mix": mix}})
        run = open_run(preset, tmp_path / "run")
        report = pipeline.distill(*run)
        assert report.mix == mix
        assert report.variant.endswith("_mix-plain-1") == (mix is not None)
        return sorted(path.name for path in (tmp_path / "run" / "rollouts").iterdir())

    open_run(Preset.model_validate(tree), tmp_path / "run")
    assert trained("plain:1") == ["heldout", "teacher", "teacher-plain-1"]
    made = (tmp_path / "run" / "student" / "quantize.json").read_bytes()
    assert trained(None) == ["heldout", "teacher", "teacher-plain-1"]
    assert (tmp_path / "run" / "student" / "quantize.json").read_bytes() == made
    other = Preset.model_validate({**tree, "prompts": {**tree["prompts"], "mix": "kdctl:1"}})
    with pytest.raises(StoreError, match=r"was trained with prompts\.mix=None, and kdctl:1 is asked for"):
        pipeline.distill(*open_run(other, tmp_path / "run"), name=trained_name(tmp_path / "run"))
    assert not (tmp_path / "run" / "rollouts" / "teacher-kdctl-1").exists()
    rows = RolloutStore(tmp_path / "run" / "rollouts" / "teacher-plain-1").read()
    assert {one.prompt_id.partition(":")[0] for one in rows} == {"plain"}
