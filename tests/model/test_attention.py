"""Sequences laid end to end see what each would see alone, whole or continued from a cache."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from kdctl.base.errors import ModelError
from kdctl.model.attention import NAME, Layout, RowCache, forward, use_layouts

SHAPE: Any = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": LlamaConfig(**SHAPE),
    "mistral, window": MistralConfig(**SHAPE, sliding_window=4),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=24),
    "gemma3, mixed windows": Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 7}, head_dim=16, sliding_window=5, query_pre_attn_scalar=16
    ),
    "phi3": Phi3Config(**SHAPE),
    "olmo2": Olmo2Config(**SHAPE),
    "opt, places counted by itself, dropout in its layers": OPTConfig(
        vocab_size=100,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        init_std=0.2,
        dropout=0.5,
    ),
    "smollm3": SmolLM3Config(**SHAPE | {"num_hidden_layers": 4}),
}
LENGTHS = (7, 3, 12, 1)


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(KINDS[kind]).eval()


def sequences() -> list[Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(3, 100, (length,), generator=numbers) for length in LENGTHS]


@torch.no_grad()
def alone(model: PreTrainedModel) -> list[Tensor]:
    """Run each sequence by itself through transformers' own attention."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return [plain.base_model(input_ids=ids.unsqueeze(0)).last_hidden_state[0] for ids in sequences()]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_end_to_end_see_only_themselves(kind: str) -> None:
    model = build(kind)
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    found = forward(model, torch.cat(sequences()), places, Layout(LENGTHS))
    torch.testing.assert_close(found, torch.cat(alone(model)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_go_on_from_a_prefix_that_was_read_before(kind: str) -> None:
    model, cache, long = build(kind), RowCache(3, 16), sequences()[2]
    shared, ends = long[:9], (long[9:11], long[10:12], long[9:10])
    wanted = [
        forward(model, whole, torch.arange(len(whole)), Layout([len(whole)]))[9:]
        for whole in (torch.cat([shared, end]) for end in ends)
    ]
    cache.point(torch.full((9,), 2), torch.arange(9))
    forward(model, shared, torch.arange(9), Layout([9], cache))
    lengths = [len(end) for end in ends]
    places = torch.cat([torch.arange(9, 9 + length) for length in lengths])
    cache.point(torch.zeros(sum(lengths), dtype=torch.int64), places)
    found = forward(model, torch.cat(ends), places, Layout(lengths, cache, prefix=9))
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_continued_rows_beside_new_sequences_see_all_of_their_own(kind: str) -> None:
    """Rows 0 and 1 are read but for their last two tokens, then one token a pass; sequences 2 and 3 join later."""
    model, cache, (first, second, third, fourth) = build(kind), RowCache(4, 16), sequences()
    wanted = alone(model)

    def read(ids: list[Tensor], rows: list[int], places: list[int], layout: Layout) -> Tensor:
        cache.point(torch.tensor(rows), torch.tensor(places))
        return forward(model, torch.cat(ids), torch.tensor(places), layout)

    read([first[:5], second[:1]], [0] * 5 + [1], [*range(5), 0], Layout((5, 1), cache))
    step = read([first[5:6], second[1:2]], [0, 1], [5, 1], Layout((), cache, torch.tensor([6, 2]), 6))
    mixed = read(
        [first[6:], second[2:], third, fourth],
        [0, 1] + [2] * 12 + [3],
        [6, 2, *range(12), 0],
        Layout((12, 1), cache, torch.tensor([7, 3]), 7),
    )
    torch.testing.assert_close(step, torch.stack([wanted[0][5], wanted[1][1]]), rtol=1e-4, atol=1e-5)
    expected = torch.cat([wanted[0][6:], wanted[1][2:], wanted[2], wanted[3]])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


def test_without_a_layout_a_model_is_transformers_own_to_the_bit(teacher: PreTrainedModel) -> None:
    ids, mask = torch.randint(0, 256, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    plain = copy.deepcopy(teacher)
    plain.set_attn_implementation("sdpa")
    use_layouts(teacher)
    assert teacher.config._attn_implementation == NAME
    with torch.no_grad():
        assert torch.equal(teacher(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
        assert torch.equal(teacher(ids).logits, plain(ids).logits)


def test_a_saved_model_does_not_name_our_attention(teacher: PreTrainedModel, tmp_path) -> None:
    use_layouts(teacher).save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text().split('"')


def test_another_attention_is_refused(teacher: PreTrainedModel) -> None:
    teacher.set_attn_implementation("eager")
    with pytest.raises(ModelError, match=r"'eager'.*knows 'sdpa' only"):
        forward(teacher, torch.tensor([1]), torch.tensor([0]), Layout((1,)))


def test_rows_are_copied_over_each_other() -> None:
    cache, numbers = RowCache(3, 4), torch.randn(1, 2, 6, 8)
    cache.point(torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 0, 1, 0]))
    cache.update(numbers, -numbers, 0)
    cache.copy(0, [1, 2], 2)
    keys, values = cache.first(0, 3, 2)
    assert torch.equal(keys, numbers[0, :, :2].expand(3, 2, 2, 8))
    assert torch.equal(values, -keys)
