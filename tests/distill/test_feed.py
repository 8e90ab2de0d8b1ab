"""Which rollouts a step trains on."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import StoreError
from kdctl.config.preset import DistillSection, PromptsSection
from kdctl.data.prompts import PromptReader
from kdctl.distill.feed import Feed, Live, Replay, ReplayedVariant, on_policy_rows, slot_index
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.store import RolloutStore
from kdctl.run.records import Rollout, StoreManifest

SETTINGS = DistillSection(lmbda=0.5, steps=7, micro_batch_size=4, refresh_every=3)


def numbered(source: str, count: int) -> list[Rollout]:
    return [Rollout(f"{source}{i}", i, 0, [1], [2, 3], None, "length", 0, 0, source) for i in range(count)]


def live(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, settings=SETTINGS) -> Live:
    prompts = PromptReader(tokenizer, PromptsSection()).train(5, 0).prompts
    engine, sampling = InProcess(teacher, [258], "student"), Sampling(1.0, 1.0, 0, 4, 0, 0)
    return Live(settings, prompts, teacher, engine, sampling, RolloutStore(folder), "identity", "writer")


def test_rows_come_from_the_source_that_the_draw_names() -> None:
    feed = Feed(SETTINGS, numbered("teacher", 10), Replay(numbered("student", 10), 0))
    for step in range(50):
        drawn = on_policy_rows(SETTINGS.seed, step, 4, 0.5)
        assert [row.source == "student" for row in feed.rows(step)] == drawn


def test_every_off_policy_item_is_used_once_a_pass() -> None:
    settings = DistillSection(lmbda=0.0, micro_batch_size=4)
    feed = Feed(settings, numbered("teacher", 8))
    first, second = ([row.prompt_id for step in steps for row in feed.rows(step)] for steps in ((0, 1), (2, 3)))
    assert sorted(first) == sorted(second) == sorted(f"teacher{i}" for i in range(8))
    assert first != second


def test_rows_depend_on_the_step_alone() -> None:
    feeds = [Feed(SETTINGS, numbered("teacher", 9), Replay(numbered("student", 7), 0)) for _ in range(2)]
    in_order = [feeds[0].rows(step) for step in range(6)]
    assert feeds[1].rows(5) == in_order[5]
    assert feeds[1].rows(2) == in_order[2]


def test_live_store_says_which_rows_each_interval_used(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = live(teacher, tokenizer, tmp_path)
    feed = Feed(SETTINGS, numbered("teacher", 9), source)
    used = {step: [row for row in feed.rows(step) if row.source == "student"] for step in range(7)}
    store = RolloutStore(tmp_path)
    written, manifest = store.read(), store.manifest()
    intervals = {"0-2": range(3), "3-5": range(3, 6), "6-6": range(6, 7)}
    rows = {key: [row for step in steps for row in used[step]] for key, steps in intervals.items()}
    assert list(manifest.steps) == [key for key in intervals if rows[key]]
    assert len(manifest.steps) >= 2
    for key, (first, last) in manifest.steps.items():
        assert list(written[first:last]) == rows[key]
        assert {row.policy_step for row in rows[key]} == {intervals[key].start}


def test_live_resumes_in_the_middle_of_an_interval(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    whole = Feed(SETTINGS, numbered("teacher", 9), live(teacher, tokenizer, tmp_path / "a"))
    expected = [whole.rows(step) for step in range(7)]
    begun = Feed(SETTINGS, numbered("teacher", 9), live(teacher, tokenizer, tmp_path / "b"))
    for step in range(5):
        begun.rows(step)
    source = live(teacher, tokenizer, tmp_path / "b")
    source.resume(4)
    resumed = Feed(SETTINGS, numbered("teacher", 9), source)
    assert [resumed.rows(step) for step in range(4, 7)] == expected[4:]
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]


def test_live_refuses_to_resume_without_what_it_trained_on(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    begun = Feed(SETTINGS, numbered("teacher", 9), live(teacher, tokenizer, tmp_path))
    begun.rows(0)
    RolloutStore(tmp_path).shard_path(0).unlink()
    with pytest.raises(StoreError, match="step 2"):
        live(teacher, tokenizer, tmp_path).resume(2)


def test_replayed_rollouts_come_in_the_slots_that_they_filled(tmp_path):
    slots = [7, 3, 12, 0]
    rows = [
        Rollout(f"p{slot}", index, slot, [1], [2], None, "stop", 0, 0, "student") for index, slot in enumerate(slots)
    ]
    store = RolloutStore(tmp_path)
    shards = tuple(store.write_shard(index, [row], "id") for index, row in enumerate(rows))
    store.finish(StoreManifest(source="student", identity="id", writer="w", sampling=None, shards=shards))
    for rollouts in (rows, store.read()):
        replayed = ReplayedVariant(rollouts, "other")
        assert [replayed.row(slot) for slot in slots] == rows
        for slot in (1, 13):
            with pytest.raises(StoreError, match=f"variant other generated no rollout for slot {slot}"):
                replayed.row(slot)
    with pytest.raises(StoreError, match="no rollout for slot 0"):
        ReplayedVariant([], "other").row(0)


# --- the λ draw -------------------------------------------------------------------------------------------------------


def draws(lmbda: float, seed: int = 0, steps: int = 2000, rows: int = 8) -> list[bool]:
    return [drawn for step in range(steps) for drawn in on_policy_rows(seed, step, rows, lmbda)]


@pytest.mark.parametrize("lmbda", [0.1, 0.5, 0.9])
def test_share_of_on_policy_rows_is_lambda(lmbda):
    found = draws(lmbda)
    tolerance = 4 * (lmbda * (1 - lmbda) / len(found)) ** 0.5
    assert abs(sum(found) / len(found) - lmbda) < tolerance


def test_lambda_zero_and_one_are_exact():
    assert not any(draws(0.0))
    assert all(draws(1.0))


def test_larger_lambda_only_adds_rows():
    small, large = draws(0.3), draws(0.6)
    assert all(b for a, b in zip(small, large, strict=True) if a)
    assert sum(large) > sum(small)


def test_draw_is_a_function_of_seed_step_and_row():
    assert draws(0.5) == draws(0.5)
    assert draws(0.5, seed=1) != draws(0.5)
    later = on_policy_rows(0, 1234, 64, 0.5)
    assert later == on_policy_rows(0, 1234, 64, 0.5)
    assert later != on_policy_rows(0, 1235, 64, 0.5)
    assert later[:8] == on_policy_rows(0, 1234, 8, 0.5)


def test_steps_and_rows_are_drawn_independently():
    table = torch.tensor([on_policy_rows(0, step, 8, 0.5) for step in range(2000)]).double()
    together = torch.corrcoef(table.T) - torch.eye(8)
    assert together.abs().max() < 0.1
    shifted = torch.corrcoef(torch.stack([table[:-1].flatten(), table[1:].flatten()]))[0, 1]
    assert shifted.abs() < 0.04


# --- the order of the data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_each_pass_covers_every_item_once(count):
    for start in range(0, 5 * count, count):
        found = [slot_index(slot, count, 3, "off_policy") for slot in range(start, start + count)]
        assert sorted(found) == list(range(count))


def test_passes_seeds_and_sources_have_their_own_order():
    def order(start: int = 0, seed: int = 0, source: str = "off_policy") -> tuple[int, ...]:
        return tuple(slot_index(slot, 20, seed, source) for slot in range(start, start + 20))

    assert order() == order()
    assert len({order(), order(start=20), order(seed=1), order(source="on_policy")}) == 4


def test_slot_decides_alone_whatever_the_rows_per_step():
    by_eight = [slot_index(step * 8 + row, 11, 0, "s") for step in range(6) for row in range(8)]
    by_four = [slot_index(step * 4 + row, 11, 0, "s") for step in range(12) for row in range(4)]
    assert by_eight == by_four
