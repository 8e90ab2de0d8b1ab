"""The tokenizer that a GGUF file describes, or a refusal that names the part which is missing or not known."""

import json
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError
from kdctl.model.gguf_file import GgufFile
from kdctl.model.tokenizer import check_templates
from kdctl.run.files import alone

PREFIX = "tokenizer.ggml."
MERGES = f"{PREFIX}merges"
HF_JSON = "tokenizer.huggingface.json"
TEMPLATE = "tokenizer.chat_template"
SPECIALS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
BYTE_LEVEL = "gpt2"
GPT2_SPLITS = {None, "default", "gpt-2", "gpt2"}
DIGIT_SPLITS = {"smollm"}


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """Build the tokenizer: from the tokenizer.json that kdctl leaves in its files, else by transformers.

    transformers reads the vocabulary and most of ``tokenizer.ggml.pre``, which says how text is split before merges;
    SmolLM's tokenizers take every digit by itself. Raises ModelError for a tokenizer that would read other tokens.
    """
    tokens = _checked_tokens(file)
    try:
        tokenizer = _exact(file, tokens) if HF_JSON in file.fields else _by_transformers(file)
        own = tokenizer([text for text, _ in tokens], add_special_tokens=False)["input_ids"]  # pyright: ignore
    except Exception as error:  # noqa: BLE001 - the Rust library raises no narrower kind for damaged parts
        raise ModelError(f"{file.path}: the tokenizer cannot be built: {error}") from None
    for (text, index), found in zip(tokens, own, strict=True):
        if found != [index]:
            raise ModelError(
                f"{file.path}: the special token {index} {text!r} would be read as {found[:8]}, since transformers "
                "does not know this kind of vocabulary; use the model's own safetensors"
            )
    _set_templates(file, tokenizer)
    return tokenizer


def _checked_tokens(file: GgufFile) -> list[tuple[str, int]]:
    """Check the parts of a vocabulary, and return its control tokens with their ids."""
    kind, tokens = _part(file, "model", str), _part(file, "tokens", list)
    types = _part(file, "token_type", list)
    if len(types) != len(tokens):
        raise ModelError(f"{file.path}: {len(tokens)} tokens and {len(types)} token types; the file is damaged")
    unmerged = kind == BYTE_LEVEL and HF_JSON in file.fields and not file.fields.get(MERGES)
    if not unmerged:
        _part(file, "merges" if kind == BYTE_LEVEL or MERGES in file.fields else "scores", list)
    split = file.field(f"{PREFIX}pre", str)
    if kind == BYTE_LEVEL and split not in GPT2_SPLITS | DIGIT_SPLITS | GGUF_PRE_TOKENIZER_SPLITS.keys():
        raise ModelError(
            f"{file.path}: how {PREFIX}pre={split!r} splits text is not known to transformers, and with another split "
            "the model would read other tokens; use the model's own safetensors"
        )
    for name in SPECIALS.values():
        index = file.field(f"{PREFIX}{name}", int)
        if index is not None and not 0 <= index < len(tokens):
            raise ModelError(f"{file.path}: {PREFIX}{name}={index!r} is none of its {len(tokens)} tokens")
    return [(text, index) for index, text in enumerate(tokens) if types[index] == TokenType.CONTROL]


def _part(file: GgufFile, name: str, kind: type) -> Any:
    value = file.fields.get(PREFIX + name)
    if not isinstance(value, kind) or not value:
        raise ModelError(f"{file.path} has no {PREFIX}{name}, without which its tokenizer cannot be built")
    return value


def _exact(file: GgufFile, control: list[tuple[str, int]]) -> PreTrainedTokenizerBase:
    """Build the tokenizer from its tokenizer.json, if that has the vocabulary which llama.cpp reads.

    The gguf package leaves empty lists out of a file, so that one without merges is whole if tokenizer.json has none.
    """
    backend = Tokenizer.from_str(file.fields[HF_JSON])
    unmerged = file.fields.get(f"{PREFIX}model") == BYTE_LEVEL and not file.fields.get(MERGES)
    if unmerged and json.loads(backend.to_str())["model"].get("merges"):
        raise ValueError(f"there is no {MERGES}, and {HF_JSON} has merges")
    tokens = file.fields[f"{PREFIX}tokens"]
    other = [text for text, index in backend.get_vocab().items() if index >= len(tokens) or tokens[index] != text]
    if other:
        raise ValueError(f"{HF_JSON} has other tokens than {PREFIX}tokens, such as {other[0]!r}")
    named = {f"{own}_token": file.fields.get(PREFIX + name) for own, name in SPECIALS.items()}
    specials = {own: tokens[index] for own, index in named.items() if index is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def _by_transformers(file: GgufFile) -> PreTrainedTokenizerBase:
    with alone(file.path) as folder:
        options = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.path.name, **options)
    if file.fields.get(f"{PREFIX}pre") in DIGIT_SPLITS:
        digits, pieces = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, pieces])
    return tokenizer


def _set_templates(file: GgufFile, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the chat template, or all of them if there are several by name."""
    named = {
        key.removeprefix(f"{TEMPLATE}."): value for key, value in file.fields.items() if key.startswith(f"{TEMPLATE}.")
    }
    default = file.fields.get(TEMPLATE)
    found = ({"default": default} if default else {}) | named if named else default
    if found is not None and not all(isinstance(each, str) for each in (named or {"": default}).values()):
        raise ModelError(f"{file.path}: {TEMPLATE} is no text")
    if isinstance(found, dict):
        check_templates(found, f"{file.path}: the tokenizer")
    tokenizer.chat_template = found
