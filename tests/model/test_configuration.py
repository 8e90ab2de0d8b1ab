"""Configurations that are damaged or of another kind end in one message; nothing of a folder's code runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import Gemma3Config, LlavaConfig, Phi4MultimodalConfig

from kdctl.base.errors import ModelError
from kdctl.model.configuration import read_config
from kdctl.model.load import skeleton
from kdctl.model.tokenizer import open_tokenizer

HARMLESS = ({"vocab_size": ...},)


def write(folder: Path, **changes: Any) -> Path:
    tree = tiny.tiny_config().to_dict() | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in tree.items() if value is not ...}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": -4},
        {"num_attention_heads": "four"},
        {"num_key_value_heads": 0},
        {"hidden_size": 65, "head_dim": None},
        {"hidden_size": 0},
        {"hidden_size": -64},
        {"hidden_size": None},
        {"hidden_act": "no such"},
        {"hidden_act": 3},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 0},
        {"vocab_size": "many"},
        {"vocab_size": ...},
        {"intermediate_size": [1, 2]},
        {"rope_parameters": 7},
        {"rope_parameters": {"rope_type": "no such", "rope_theta": 1.0}},
        {"rms_norm_eps": "small"},
        {"model_type": "no such"},
        {"model_type": 5},
        {"model_type": ...},
        {"layer_types": ["no such"]},
        {"dtype": "no such"},
        {"quantization_config": 4},
    ],
    ids=str,
)
def test_an_impossible_value_is_one_message_or_of_no_effect(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path, **changes)
    if changes in HARMLESS:
        skeleton(read_config(tmp_path))
        return
    with pytest.raises(ModelError) as caught:
        skeleton(read_config(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", "\xff", "[" * 100_000, '{"model_type": "llama", '])
def test_what_is_no_configuration_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match="configuration cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize(("pad", "kept"), [(264, None), (-1, None), (10**12, None), (0, 0), (258, 258)])
def test_a_padding_token_that_no_row_stands_for_is_none(tmp_path: Path, pad: int, kept: int | None) -> None:
    config = read_config(write(tmp_path, pad_token_id=pad))
    assert config.pad_token_id == kept
    skeleton(config)


def test_composite_models_are_refused_for_what_they_are_where_no_part_is_taken(tmp_path: Path) -> None:
    text = {name: value for name, value in tiny.SIZES.items() if name != "bos_token_id"}
    for config in (Gemma3Config(text_config=text), LlavaConfig(text_config={"model_type": "llama", **text})):
        config.save_pretrained(tmp_path)
        with pytest.raises(
            ModelError, match=rf"'{config.model_type}' is a composite model, .* its text part .*as teacher"
        ):
            read_config(tmp_path)
    Phi4MultimodalConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'phi4_multimodal' is a composite model"):
        read_config(tmp_path)


def test_code_in_a_folder_neither_runs_nor_is_asked_about(tmp_path: Path) -> None:
    trap = "import pathlib\npathlib.Path('RAN').touch()\n".replace("RAN", str(tmp_path / "ran"))
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (tmp_path / f"{name}.py").write_text(trap)
    own = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    write(tmp_path, model_type="own_kind", auto_map=own)
    tokenizer = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for opened in (read_config, open_tokenizer):
        with pytest.raises(ModelError, match=r"kdctl runs no code from model\s+folders") as caught:
            opened(tmp_path)
        assert "trust_remote_code" not in str(caught.value)
    write(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_own.M"})
    assert type(skeleton(read_config(tmp_path))).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()
