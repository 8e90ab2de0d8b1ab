"""Stored teacher states are those of a pass of the teacher, found by rollout, and training on them repeats."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from kdctl.base.errors import StoreError
from kdctl.base.progress import Silent
from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.formats.student import load_student
from kdctl.model.batch import collate, predicting_states
from kdctl.rollout import mapped, teacher_states
from kdctl.rollout.store import RolloutStore
from kdctl.rollout.teacher_states import TeacherStates, from_int8, int8
from kdctl.run import hashes
from kdctl.run.records import Rollout, StoreManifest
from kdctl.stages import pipeline
from kdctl.stages.context import open_run

ROWS = [
    Rollout(f"p{i}", i, 0, [65 + i] * (2 + i), [70 + i] * (3 + 2 * i), None, "length", 0, 0, "teacher")
    for i in range(5)
]


def filled(folder: Path, rows: Sequence[Rollout] = ROWS) -> RolloutStore:
    store = RolloutStore(folder)
    shards = tuple(store.write_shard(index, part, "id") for index, part in enumerate((rows[:3], rows[3:])))
    store.finish(StoreManifest(source="teacher", identity="id", writer="w", sampling=None, shards=shards))
    return store


def test_states_are_those_of_a_pass_of_the_teacher_and_cut_like_the_batch(
    teacher_fp32: PreTrainedModel, tmp_path: Path
) -> None:
    states = TeacherStates("teacher")
    states.fill(filled(tmp_path), teacher_fp32, Silent())
    for max_tokens in (999, 7):
        batch = collate(ROWS[::-1], max_tokens)
        found = states.of(ROWS[::-1], batch.counts)
        torch.testing.assert_close(found, predicting_states(teacher_fp32, batch), rtol=1e-5, atol=1e-5)


def test_states_of_another_shard_or_teacher_are_made_again(teacher_fp32: PreTrainedModel, tmp_path: Path) -> None:
    store = filled(tmp_path)
    file = tmp_path / "shard-00000.states.safetensors"
    TeacherStates("one").fill(store, teacher_fp32, Silent())
    written = file.stat().st_mtime_ns
    TeacherStates("one").fill(store, teacher_fp32, Silent())
    assert file.stat().st_mtime_ns == written
    TeacherStates("two").fill(store, teacher_fp32, Silent())
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["made_of"])["teacher"] == "two"
    file.write_bytes(file.read_bytes()[:100])
    TeacherStates("two").fill(store, teacher_fp32, Silent())
    with safe_open(file, "pt") as opened:
        assert opened.keys() == ["states"]


def test_rollouts_of_several_stores_and_of_any_order_are_told_apart(
    teacher_fp32: PreTrainedModel, tmp_path: Path
) -> None:
    live = [replace(row, source="student", sample_index=index) for index, row in enumerate(ROWS[::-1], 7)]
    other = [replace(row, prompt_id=f"{row.prompt_id} of another set") for row in live]
    states = TeacherStates("teacher")
    for name, rows in (("teacher", ROWS), ("live", live)):
        states.fill(filled(tmp_path / name, rows), teacher_fp32, Silent())
    mixed = [live[2], ROWS[2], live[0], ROWS[4], live[4]]
    batch = collate(mixed)
    torch.testing.assert_close(
        states.of(mixed, batch.counts), predicting_states(teacher_fp32, batch), rtol=1e-5, atol=1e-5
    )
    for row in (other[2], replace(live[0], sample_index=99), replace(ROWS[0], source="dataset")):
        with pytest.raises(StoreError, match=f"no states.*of prompt {row.prompt_id}"):
            states.of([row], [1])


def test_states_are_found_in_the_shard_in_use_and_the_one_before(teacher_fp32: PreTrainedModel, tmp_path: Path) -> None:
    store, states = RolloutStore(tmp_path), TeacherStates("teacher")
    for index, row in enumerate(ROWS[:3]):
        states.add(store, store.write_shard(index, [row], "id"), [row], teacher_fp32)
    assert states.of(ROWS[1:3], [2, 2]).shape == (4, teacher_fp32.config.hidden_size)
    with pytest.raises(StoreError, match="of prompt p0"):
        states.of(ROWS[:1], [1])


def test_no_rollout_is_decoded_to_find_states_and_no_file_is_read_twice(
    teacher_fp32: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED_S", 0.0)
    store = filled(tmp_path)
    TeacherStates("teacher").fill(store, teacher_fp32, Silent())
    monkeypatch.setattr(mapped, "value_of", lambda scalar: pytest.fail("a rollout was decoded"))
    TeacherStates("teacher").fill(store, teacher_fp32, Silent())
    monkeypatch.setattr(teacher_states, "content_hash", lambda tensors: pytest.fail("states were read"))
    for known in (hashes._KNOWN, {}):
        monkeypatch.setattr(hashes, "_KNOWN", known)
        states = TeacherStates("teacher")
        states.fill(store, teacher_fp32, Silent())
        assert states.of(ROWS[2:], [5, 5, 5]).shape == (15, teacher_fp32.config.hidden_size)


@pytest.mark.parametrize(("hidden", "group"), [(64, 32), (48, 16), (7, 1)])
def test_int8_is_off_by_half_a_step_of_its_group_at_most(hidden: int, group: int) -> None:
    states = torch.randn(9, hidden, generator=torch.Generator().manual_seed(0)) * 3
    states[:, 0] *= 40
    states[4] = 0
    kept = int8(states)
    assert (kept["states"].dtype, kept["scale"].dtype) == (torch.int8, torch.float16)
    assert kept["scale"].shape == (9, hidden // group)
    step = kept["scale"].float().repeat_interleave(group, -1)
    assert ((from_int8(kept) - states).abs() <= step * 0.56).all()  # 0.5, and the scale's own rounding 127 times
    assert not from_int8(kept)[4].any()


def test_states_kept_as_int8_are_read_back_and_take_half(teacher_fp32: PreTrainedModel, tmp_path: Path) -> None:
    exact, coarse = TeacherStates("teacher"), TeacherStates("teacher", "int8")
    counts = collate(ROWS).counts
    exact.fill(filled(tmp_path / "exact"), teacher_fp32, Silent())
    coarse.fill(filled(tmp_path / "int8"), teacher_fp32, Silent())
    wanted, found = exact.of(ROWS, counts), coarse.of(ROWS, counts)
    assert torch.equal(found, from_int8(int8(wanted)))
    with safe_open(tmp_path / "int8" / "shard-00000.states.safetensors", "pt") as file:
        kept = [file.get_tensor(name) for name in ("states", "scale")]
    tokens, hidden = kept[0].shape
    assert sum(tensor.nbytes for tensor in kept) == tokens * (hidden + 2 * hidden // 32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exact", "int8"])
def test_training_on_kept_states_is_near_training_with_a_live_teacher(smoke: Preset, tmp_path: Path, kind: str) -> None:
    kept = build_preset(smoke.model_dump(), {"rollout.keep_states": kind}, "test")
    live = pipeline.distill(*open_run(smoke, tmp_path / "run"))
    cached = pipeline.distill(*open_run(kept, tmp_path / "run"), name="cached")
    assert (tmp_path / "run" / "rollouts" / "teacher" / "shard-00000.states.safetensors").exists()
    assert cached.stores == live.stores
    assert cached.after.forward_kl.value == pytest.approx(live.after.forward_kl.value, rel=0.05)


@pytest.mark.slow
def test_replaying_a_live_run_on_its_kept_states_gives_its_weights_to_the_bit(smoke: Preset, tmp_path: Path) -> None:
    changes = {"rollout.keep_states": "exact", "distill.lmbda": 0.5, "distill.refresh_every": 2}
    preset = build_preset(smoke.model_dump(), changes, "test")
    first = pipeline.distill(*open_run(preset, tmp_path), name="first")
    again = build_preset(preset.model_dump(), {"distill.replay": "first"}, "test")
    second = pipeline.distill(*open_run(again, tmp_path), name="second")
    assert second.after == first.after
    run = open_run(preset, tmp_path).context.paths
    one, two = (load_student(run.variant(name).final, torch.device("cpu")).weights for name in ("first", "second"))
    for name in one:
        assert torch.equal(one[name].codes, two[name].codes)
        assert torch.equal(one[name].qparams.scale, two[name].qparams.scale)


def test_a_flipped_bit_of_stored_states_makes_them_again(teacher_fp32: PreTrainedModel, tmp_path: Path) -> None:
    store = filled(tmp_path)
    TeacherStates("teacher").fill(store, teacher_fp32, Silent())
    path = next(store.path.glob("*.states.safetensors"))
    whole, states = path.read_bytes(), load_file(path)["states"].clone()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    assert not torch.equal(load_file(path)["states"], states)
    TeacherStates("teacher").fill(store, teacher_fp32, Silent())
    assert torch.equal(load_file(path)["states"], states)
