"""What ends a completion: what transformers' ``generate`` stops at, and the tokenizer's end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError
from kdctl.model.stops import described, stop_ids, stop_texts

ROWS = 264
OWN = 258


def folder_with(tiny_dir: Path, place: Path, config: dict[str, Any], generation: object) -> Path:
    """Copy the tiny model, change its configuration, and give it a generation configuration or none."""
    shutil.copytree(tiny_dir, place)
    tree = json.loads((place / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps({**tree, **config}))
    (place / "generation_config.json").unlink()
    if generation is not None:
        (place / "generation_config.json").write_text(json.dumps(generation))
    return place


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": 7}, {"eos_token_id": [9, OWN]}])
@pytest.mark.parametrize(
    "config",
    [
        {"eos_token_id": None},
        {"eos_token_id": 10},
        {"eos_token_id": [OWN, 10, 32]},
        {"eos_token_id": None, "text_config": {"eos_token_id": [11, 12]}},
        {"eos_token_id": 3, "decoder": {"eos_token_id": 4}},
    ],
)
def test_stops_are_what_generate_stops_at_and_the_tokenizers_end(
    tiny_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, config: dict[str, Any], generation: object
) -> None:
    folder = folder_with(tiny_dir, tmp_path / "m", config, generation)
    place = {} if generation is not None else {"config_file_name": "config.json", "_from_model_config": True}
    configured = GenerationConfig.from_pretrained(folder, **place).eos_token_id
    theirs = configured if isinstance(configured, list) else [] if configured is None else [configured]
    assert set(stop_ids(folder, tokenizer, ROWS)) == {*theirs, OWN}


@pytest.mark.parametrize("value", [ROWS, -1, "</s>", [258, [10]], True, [1.0], {"a": 1}, [None], 10**30])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_token_is_refused_with_its_file(
    tiny_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, value: object
) -> None:
    stated = {"eos_token_id": value}
    config, generation = (stated, None) if name == "config.json" else ({}, stated)
    folder = folder_with(tiny_dir, tmp_path / "m", config, generation)
    with pytest.raises(ModelError, match=name):
        stop_ids(folder, tokenizer, ROWS)


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff\xfe{}", b'{"max_new_tokens": -5}', b"[" * 100_000])
def test_a_damaged_generation_configuration_is_refused(
    tiny_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: bytes
) -> None:
    folder = folder_with(tiny_dir, tmp_path / "m", {}, {})
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        stop_ids(folder, tokenizer, ROWS)


def test_stops_are_said_with_their_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert described((32, OWN), tokenizer) == f"completions end at 32 'A', {OWN} {tokenizer.eos_token!r}"
    assert described((), tokenizer).startswith("warning: nothing ends a completion")


@pytest.mark.parametrize(("generation", "words"), [(None, ""), ({}, ""), ({"stop_strings": ["#"]}, "texts ['#']")])
def test_texts_at_which_generate_stops_are_said_to_be_no_ends(
    tiny_dir: Path, tmp_path: Path, generation: object, words: str
) -> None:
    found = stop_texts(folder_with(tiny_dir, tmp_path / "m", {}, generation))
    assert bool(found) == bool(words)
    assert words in found
