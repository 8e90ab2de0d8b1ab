"""Tokenized prompts, and the cache of them: a source is tokenized once for each way of asking, whoever asks.

A file of the cache is named by a hash of everything that decides its prompts. It carries a hash of its own content and
is made again where that does not fit, so a half-written or damaged one is never taken.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.config.resolve import canonical
from kdctl.run.files import write_bytes
from kdctl.run.paths import cache_dir
from kdctl.run.records import Prompt

FORMAT = 1  # raise it when prompts are made or kept differently, so that older files are not taken
INTEGERS = pa.list_(pa.int32())
SCHEMA = pa.schema([("id", pa.string()), ("index", pa.int32()), ("prompt_ids", INTEGERS), ("completion_ids", INTEGERS)])
HASH = 32
"""Bytes of a SHA-256."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order in which a store takes them, and how many were left out as too long.

    known: their fingerprint where it was worked out before; missing: prompts that sources of a mixture had too few of.
    """

    prompts: list[Prompt]
    skipped: int
    known: str | None = field(default=None, compare=False)
    missing: Mapping[str, int] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.prompt_ids) for prompt in self.prompts)

    def fingerprint(self) -> str:
        """Hash every token of every prompt and completion."""
        return self.known or sha256_of(canonical([vars(prompt) for prompt in self.prompts]))


def kept(key: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, make: Callable[[], PromptSet]) -> PromptSet:
    """Return what ``make`` returned before for this key and tokenizer, or make it and keep it.

    Only a tokenizer that can be hashed whole has its prompts kept.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return make()
    name = sha256_of(canonical({**key, **_tokenizer_key(tokenizer), "format": FORMAT}))
    path = cache_dir() / "prompts" / f"{name[:32]}.arrow"
    found = _read(path, path.stat().st_mtime_ns) if path.is_file() else None
    if found is not None:
        return found
    made = make()
    made = replace(made, known=made.fingerprint())
    with suppress(OSError):  # where the cache cannot be written, they are tokenized again next time
        write_bytes(path, _encoded(made))
    return made


def sha256_of(text: str) -> str:
    """Hash a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer_key(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return all that decides what a tokenizer makes of a conversation, but the day that some templates name."""
    return {
        "tokenizer": sha256_of(tokenizer.backend_tokenizer.to_str()),
        "template": str(tokenizer.chat_template),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "transformers": transformers.__version__,
    }


def _encoded(found: PromptSet) -> bytes:
    metadata = {"skipped": str(found.skipped), "fingerprint": found.fingerprint()}
    table = pa.Table.from_pylist([vars(prompt) for prompt in found.prompts], SCHEMA.with_metadata(metadata))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    return hashlib.sha256(data).digest() + data


@lru_cache(maxsize=4)
def _read(path: Path, written_ns: int) -> PromptSet | None:
    """Read a file of the cache, None if it is not whole. written_ns: its time, so that a new one is read again."""
    data = path.read_bytes()
    if hashlib.sha256(data[HASH:]).digest() != data[:HASH]:
        return None
    try:
        table = pa.ipc.open_stream(data[HASH:]).read_all()
    except pa.ArrowInvalid:
        return None
    prompts = [Prompt(*row) for row in zip(*map(_values, table.columns), strict=True)]
    metadata = table.schema.metadata
    return PromptSet(prompts, int(metadata[b"skipped"]), metadata[b"fingerprint"].decode())


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Return a column as Python has it; lists by way of numpy, which is ten times as fast."""
    if column.type != INTEGERS:
        return column.to_pylist()
    return [cell.values.to_numpy().tolist() if cell.is_valid else None for chunk in column.chunks for cell in chunk]
