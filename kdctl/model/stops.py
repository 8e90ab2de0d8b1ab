"""Which tokens end a completion: those at which transformers' ``generate`` stops, and the tokenizer's own.

``generate`` goes by generation_config.json; only where there is none, it goes by config.json, whose text part is asked
where the whole says nothing (``GenerationConfig.from_model_config``).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError

CONFIG, GENERATION = "config.json", "generation_config.json"
TEXT_PARTS = ("decoder", "generator", "text_config")
FIELD, TEXTS = "eos_token_id", "stop_strings"


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[int, ...]:
    """Return every token that ends a completion, in order.

    vocabulary: rows of the model's embedding. Raises ModelError for a damaged file and for what is no token.
    """
    found = _generation(folder) or configured(folder)
    return tuple(sorted({*_tokens(found, folder, vocabulary), *own_stops(tokenizer)}))


def own_stops(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokenizer's end of sequence, if it has one."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]  # pyright: ignore


def read_from_config(folder: Path) -> bool:
    """Tell whether config.json says what ends a completion, which earlier versions did not read."""
    return not (folder / GENERATION).is_file()


def stop_texts(folder: Path) -> str:
    """Return a warning where ``generate`` also stops at texts, which are no tokens; empty where it does not."""
    texts = _object(folder / GENERATION).get(TEXTS) if (folder / GENERATION).is_file() else None
    if not texts:
        return ""
    return (
        f"warning: {GENERATION} ends completions at the texts {texts!r:.200} too ({TEXTS}), and kdctl's end at tokens "
        "alone; they may go on behind such a text"
    )


def described(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Say in one line what ends a completion; a warning where nothing does."""
    if not ids:
        return (
            "warning: nothing ends a completion, because neither generation_config.json nor config.json nor the "
            "tokenizer names a token; each goes on to its longest"
        )
    return "completions end at " + ", ".join(f"{id} {str(tokenizer.decode([id]))!r}" for id in ids)


def _generation(folder: Path) -> tuple[str, Any] | None:
    """Return what generation_config.json says, None where there is none."""
    if not (folder / GENERATION).is_file():
        return None
    tree = _object(folder / GENERATION)
    try:
        GenerationConfig.from_dict(dict(tree))
    except Exception as error:  # noqa: BLE001 - whatever a value of the wrong kind makes of the checks
        raise ModelError(f"{folder / GENERATION} cannot be used: {error}; mend it or fetch the model again") from None
    return GENERATION, tree.get(FIELD)


def configured(folder: Path) -> tuple[str, Any]:
    """Return what config.json says, of the whole or else of its text part."""
    tree = _object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    part = next((tree[name] for name in TEXT_PARTS if tree.get(name)), {})
    inner = part.get(FIELD) if isinstance(part, dict) else None
    return CONFIG, inner if tree.get(FIELD) is None else tree[FIELD]


def _object(path: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}; fetch the model again") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path} holds {tree!r:.40}, not an object of settings; fetch the model again")
    return tree


def _tokens(found: tuple[str, Any], folder: Path, vocabulary: int) -> list[int]:
    """Check that a value is a token or a list of tokens."""
    name, value = found
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for id in ids:
        if type(id) is not int or not 0 <= id < vocabulary:
            raise ModelError(
                f"{folder / name}: {FIELD}={value!r:.80} is not a token or a list of tokens, whole numbers from 0 to "
                f"{vocabulary - 1}; completions would not end where they should. Correct it in the file"
            )
    return ids
