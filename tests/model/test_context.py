"""How long a sequence may be: within it packed sequences are what transformers computes for each alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from kdctl.base.errors import ModelError, PresetError
from kdctl.model.attention import Layout, forward
from kdctl.model.configuration import read_config
from kdctl.model.context import Reach, check_completions, reach_of

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def config_of(kind: str = "llama", **changes: Any) -> PretrainedConfig:
    """Describe a tiny network."""
    return AutoConfig.for_model(kind, **{**SIZES, **changes})


LONGROPE: dict[str, Any] = {
    "kind": "phi3",
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 16,
    "rope_parameters": LONG,
}


@pytest.mark.parametrize(
    ("config", "tokens", "word"),
    [
        ({}, 32, "context"),
        ({"rope_parameters": DYNAMIC}, 32, "dynamic"),
        (LONGROPE, 16, "longrope"),
        ({"rope_parameters": LONG | {"original_max_position_embeddings": 16.0}}, 16, "longrope"),
        ({"rope_parameters": DYNAMIC | {"notes": {}}}, 32, "dynamic"),
        ({"kind": "qwen2", "rope_parameters": YARN}, 128, "context"),
        ({"kind": "gpt2", "n_positions": 24}, 24, "context"),
        ({"kind": "whisper", "max_target_positions": 24}, 24, "max_target_positions"),
        ({"kind": "bloom"}, None, ""),
    ],
)
def test_reach_is_the_context_or_where_rotary_factors_begin_to_depend_on_the_longest(
    config: dict[str, Any], tokens: int | None, word: str
) -> None:
    if config.get("kind") in ("gpt2", "bloom", "whisper"):
        found = reach_of(AutoConfig.for_model(config["kind"], **{k: v for k, v in config.items() if k != "kind"}))
    else:
        found = reach_of(config_of(**config))
    assert found.tokens == tokens
    assert word in found.why


@pytest.mark.parametrize("config", [{"rope_parameters": DYNAMIC}, LONGROPE])
@torch.inference_mode()
def test_within_reach_packed_sequences_are_those_alone_and_beyond_it_they_are_refused(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    described = config_of(**config)
    model = AutoModelForCausalLM.from_config(described, dtype=torch.float32).eval()
    tokens = reach_of(described).tokens
    assert tokens is not None
    sequences = [torch.randint(64, (length,)) for length in (5, tokens, 9)]
    alone = torch.cat([model.base_model(ids[None]).last_hidden_state[0] for ids in sequences])
    places = torch.cat([torch.arange(len(ids)) for ids in sequences])
    packed = forward(model, torch.cat(sequences), places, Layout([len(ids) for ids in sequences]))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    long = torch.arange(tokens + 1)
    with pytest.raises(ModelError, match=f"{tokens + 1} tokens"):
        forward(model, long, long, Layout([tokens + 1]))


@pytest.mark.parametrize("value", ["16", None, 0, float("inf")])
def test_rotary_factors_that_begin_nowhere_are_refused(value: object) -> None:
    config = config_of()
    config.rope_parameters = LONG | {"original_max_position_embeddings": value}
    with pytest.raises(ModelError, match="longrope"):
        reach_of(config)


def test_completions_out_of_reach_are_refused_with_the_settings_that_help() -> None:
    reach = Reach(100, "the network's context is 100 tokens")
    check_completions(reach, 60, 40, "rollout.max_new_tokens")
    check_completions(Reach(None), 10**9, 10**9, "rollout.max_new_tokens")
    with pytest.raises(
        PresetError, match=r"lower rollout\.max_new_tokens to 40, or prompts\.max_prompt_tokens .*, or both$"
    ):
        check_completions(reach, 60, 41, "rollout.max_new_tokens")
    with pytest.raises(PresetError, match=r"lower prompts\.max_prompt_tokens .*, and rollout\.max_new_tokens if"):
        check_completions(reach, 100, 40, "rollout.max_new_tokens")
    with pytest.raises(PresetError, match=r"lower rollout\.max_new_tokens to 40, or prompts\.max_prompt_tokens"):
        check_completions(reach, 60, 100, "rollout.max_new_tokens")


@pytest.mark.parametrize(("reach", "tokens", "room"), [(Reach(None), 5, 7), (Reach(10), 5, 5), (Reach(10), 12, 0)])
def test_room_is_what_is_left_of_the_reach(reach: Reach, tokens: int, room: int) -> None:
    assert reach.room(tokens, 7) == room


@pytest.mark.parametrize("part", [7, "x", [1]])
def test_a_text_part_that_is_no_configuration_is_refused(tiny_dir: Path, tmp_path: Path, part: object) -> None:
    tree = json.loads((tiny_dir / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**tree, "text_config": part}))
    with pytest.raises(ModelError, match="text part"):
        read_config(tmp_path)
