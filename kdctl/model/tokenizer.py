"""Tokenizers from disk, and whether two are the same, without which no two models can be compared."""

from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoTokenizer, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError
from kdctl.model.configuration import reason
from kdctl.run.names import stays_inside

VOCABULARY = "vocabulary"
SPLITTING = "splitting of text"
SPECIALS = "special tokens"
PROBES = (
    topics["with"],
    "naïve café, Straße, ἀλήθεια, 東京 – 12,345.678 €; 🙂\n\n\tdef f(x):\n        return x ** 2\r\n",
    "  leading and trailing   spaces  ",
)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises ModelError if it is missing or damaged."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"{type(tokenizer).__name__} is several tokenizers in one")
        tokenizer(list(PROBES))  # a vocabulary without the token for what it does not know fails here, not later
        return tokenizer
    except Exception as error:  # noqa: BLE001 - the Rust library raises no narrower kind for a damaged file
        lacks = "" if (folder / "tokenizer.json").is_file() else "it has no tokenizer.json, which holds it; "
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {lacks}{reason(error)}") from None


def load_tokenizer(folder: Path, model_type: str = "the model") -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises ModelError if it is missing or has no chat template."""
    tokenizer = open_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder}: the tokenizer of {model_type} has no chat template, and kdctl works on chat prompts"
        )
    if isinstance(tokenizer.chat_template, dict):
        check_templates(tokenizer.chat_template, f"{folder}: the tokenizer of {model_type}")
    return tokenizer


def check_templates(named: Mapping[str, str], whose: str) -> None:
    """Raise ModelError unless one of several templates is the default, and all can be files of a student's folder."""
    if "default" not in named:
        raise ModelError(
            f"{whose} has several chat templates and none is named 'default'; there are {', '.join(map(repr, named))}. "
            "Rename the one to use"
        )
    if bad := [name for name in named if not stays_inside(name) or "/" in name]:
        raise ModelError(
            f"{whose} has a chat template named {bad[0]!r}; the name is that of a file in a model's folder, and this "
            "one would lead elsewhere. Rename it"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise ModelError if the tokenizer can produce ids that the model has no row for."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no tokens; fetch its files again")
    if largest >= config.vocab_size:
        raise ModelError(
            f"the tokenizer's largest id {largest} is outside the model's vocabulary of {config.vocab_size}"
        )


def differences(found: PreTrainedTokenizerBase, expected: PreTrainedTokenizerBase) -> list[str]:
    """Name what differs between two tokenizers, in words; nothing where they are the same."""
    mine, theirs = _parts(found), _parts(expected)
    return [name for name in mine if mine[name] != theirs[name]]


def _parts(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, object]:
    return {
        VOCABULARY: tokenizer.get_vocab(),
        SPLITTING: [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES],
        SPECIALS: (tokenizer.special_tokens_map, tokenizer("")["input_ids"]),
        "chat template": tokenizer.chat_template,
    }
