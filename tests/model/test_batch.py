"""Which tokens carry loss, which rows a step trains on."""

import dataclasses

import pytest
import torch

from kdctl.model.batch import Batch, collate, split
from kdctl.run.records import Rollout

EOS = 258
LENGTHS = [(3, 5), (10, 1), (1, 9), (6, 6), (2, 2), (8, 3), (4, 4)]
"""Prompt and completion tokens of ragged rollouts."""


def rollout(index: int, prompt: int, completion: int) -> Rollout:
    """Make a rollout whose prompt and completion end with end-of-sequence."""
    return Rollout(
        prompt_id=f"p{index}",
        prompt_index=index,
        sample_index=0,
        prompt_ids=[100 + index] * (prompt - 1) + [EOS],
        completion_ids=[10 * index + j for j in range(completion - 1)] + [EOS],
        logprobs=None,
        finish_reason="stop",
        policy_step=0,
        seed=0,
        source="dataset",
    )


ROLLOUTS = [rollout(index, *lengths) for index, lengths in enumerate(LENGTHS)]


def sequences_of(batch: Batch) -> list[list[int]]:
    return [part.tolist() for part in batch.input_ids.split(batch.seq_lens)]


def completions_of(batch: Batch) -> list[list[int]]:
    return [part.tolist() for part in batch.targets().split(batch.counts)]


# --- which tokens carry loss ------------------------------------------------------------------------------------------


def test_loss_is_on_the_completion_and_nothing_else():
    batch = collate(ROLLOUTS, 999)
    assert sequences_of(batch) == [item.prompt_ids + item.completion_ids for item in ROLLOUTS]
    assert completions_of(batch) == [item.completion_ids for item in ROLLOUTS]
    assert batch.completion_tokens == sum(completion for _, completion in LENGTHS)


def test_no_token_is_padding_and_places_count_from_each_start():
    batch = collate(ROLLOUTS, 999)
    assert len(batch.input_ids) == sum(map(sum, LENGTHS))
    assert batch.position_ids.tolist() == [place for lengths in LENGTHS for place in range(sum(lengths))]


@pytest.mark.parametrize("max_tokens", [2, 4, 8, 11, 12, 999])
def test_max_tokens_cuts_the_completion(max_tokens):
    batch = collate(ROLLOUTS, max_tokens)
    assert sequences_of(batch) == [(item.prompt_ids + item.completion_ids)[:max_tokens] for item in ROLLOUTS]
    kept = [item.completion_ids[: max(0, max_tokens - len(item.prompt_ids))] for item in ROLLOUTS]
    assert completions_of(batch) == kept


def test_a_first_token_without_a_prompt_has_no_predecessor_and_carries_no_loss():
    bare = dataclasses.replace(ROLLOUTS[0], prompt_ids=[])
    batch = collate([ROLLOUTS[1], bare], 999)
    assert completions_of(batch) == [ROLLOUTS[1].completion_ids, bare.completion_ids[1:]]


# --- what predicts what -----------------------------------------------------------------------------------------------


def test_predicting_and_targets_align_like_a_loop():
    batch = collate(ROLLOUTS, 12)
    starts = [sum(batch.seq_lens[:row]) for row in range(len(batch.seq_lens))]
    places, targets = [], []
    for start, item in zip(starts, ROLLOUTS, strict=True):
        for place, token in enumerate(item.completion_ids, start=len(item.prompt_ids)):
            if place < 12:
                places.append(start + place - 1)
                targets.append(token)
    assert batch.predicting.tolist() == places
    assert batch.targets().tolist() == targets


def test_moving_a_batch_keeps_it():
    batch = collate(ROLLOUTS, 999)
    moved = batch.to(torch.device("cpu"))
    for name, value in vars(batch).items():
        same = torch.equal(value, vars(moved)[name]) if isinstance(value, torch.Tensor) else value == vars(moved)[name]
        assert same, name


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_are_what_their_rollouts_alone_make(size: int):
    found = collate(ROLLOUTS, 12).parts(size)
    expected = [collate(part, 12) for part in split(ROLLOUTS, size)]
    for part, alone in zip(found, expected, strict=True):
        assert torch.equal(part.input_ids, alone.input_ids)
        assert torch.equal(part.position_ids, alone.position_ids)
        assert torch.equal(part.predicting, alone.predicting)
        assert (part.seq_lens, part.counts) == (alone.seq_lens, alone.counts)
