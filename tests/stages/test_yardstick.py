"""The yardstick: made by asking for it, read once, and never by reading an attribute."""

from pathlib import Path

import pytest
import torch

from kdctl.base.errors import DataError, StoreError
from kdctl.config.preset import Preset
from kdctl.eval.distribution import predicting_states
from kdctl.stages.context import open_run
from kdctl.stages.quantize import quantize
from kdctl.stages.yardstick import ensure_heldout, ensure_measuring


def files(folder: Path) -> dict[str, int]:
    """Say what lies in a folder and when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_opening_a_run_writes_its_preset_and_nothing_else(smoke: Preset, tmp_path: Path) -> None:
    context, teacher = open_run(smoke, tmp_path / "run")
    _ = context.preset, context.paths, context.reporter, context.ranks
    assert [path.name for path in (tmp_path / "run").glob("[!.]*")] == ["preset.json"]
    assert not teacher.loaded


def test_what_is_there_is_neither_written_nor_read_by_a_model_again(smoke: Preset, tmp_path: Path) -> None:
    ensure_heldout(*open_run(smoke, tmp_path))
    before = files(tmp_path)
    context, teacher = open_run(smoke, tmp_path)
    measuring = ensure_measuring(context, teacher)
    assert measuring.identity
    assert not teacher.loaded, "the teacher reads when something is measured"
    assert files(tmp_path) == before


def test_a_single_document_is_no_yardstick(smoke: Preset, tmp_path: Path) -> None:
    one = smoke.model_copy(update={"heldout": smoke.heldout.model_copy(update={"num_prompts": 1})})
    with pytest.raises(DataError, match=r"1 held-out prompt, .*heldout\.num_prompts"):
        ensure_heldout(*open_run(one, tmp_path))


def test_the_teacher_reads_the_yardstick_once(smoke: Preset, tmp_path: Path) -> None:
    measuring = ensure_measuring(*open_run(smoke, tmp_path))
    assert measuring.yardstick() is measuring.yardstick()
    assert measuring.text_yardstick() is measuring.text_yardstick()
    first, few = measuring.yardstick(), measuring.yardstick(3)
    assert sum(len(batch.seq_lens) for batch in few.batches) == 3 < sum(len(batch.seq_lens) for batch in first.batches)
    states = predicting_states(measuring.teacher.load(), first.batches[0])
    assert torch.equal(states, first.states[0])


def test_a_folder_without_what_was_measured_of_it_is_refused_by_name(smoke: Preset, tmp_path: Path) -> None:
    context, teacher = open_run(smoke, tmp_path)
    measuring = ensure_measuring(context, teacher)
    quantize(context, teacher, measuring)
    assert measuring.measured(context.paths.student) is not None
    table = context.paths.student / "heldout.parquet"
    for damage in (lambda: table.write_bytes(b""), table.unlink):
        damage()
        with pytest.raises(StoreError, match=r"heldout\.parquet is missing or damaged"):
            measuring.measured(context.paths.student)
