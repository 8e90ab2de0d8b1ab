"""Tokenized prompts, and the cache of them: a source is tokenized once for each way of asking, whoever asks.

A file of the cache is an Arrow stream that is mapped, named by a hash of everything that decides its prompts. It ends
with a hash of its own content and is made again where that does not fit, so a half-written or damaged one is never
taken.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.config.resolve import canonical
from kdctl.run.hashes import known_files
from kdctl.run.paths import cache_dir
from kdctl.run.records import Prompt
from kdctl.run.streams import mapped_stream, value_of, whole_sha256, write_stream

FORMAT = 2  # raise it when prompts are made or kept differently, so that older files are not taken
INTEGERS = pa.list_(pa.int32())
SCHEMA = pa.schema([("id", pa.string()), ("index", pa.int32()), ("prompt_ids", INTEGERS), ("completion_ids", INTEGERS)])
TOGETHER = 1024
"""Prompts of a record batch."""


@dataclass(frozen=True, eq=False)
class PackedPrompts(Sequence[Prompt]):
    """Prompts in an Arrow table, 4 bytes a token in memory or none in a mapped file; each decoded when asked for."""

    table: pa.Table
    rows: range

    @staticmethod
    def of(prompts: Iterable[Prompt]) -> "PackedPrompts":
        """Pack prompts, some at a time."""
        found, batches = iter(prompts), []
        while part := list(islice(found, TOGETHER)):
            batches.append(pa.RecordBatch.from_pylist([vars(prompt) for prompt in part], schema=SCHEMA))
        return PackedPrompts.whole(pa.Table.from_batches(batches, schema=SCHEMA))

    @staticmethod
    def whole(table: pa.Table) -> "PackedPrompts":
        """Return all prompts of a table."""
        return PackedPrompts(table, range(len(table)))

    def __len__(self) -> int:
        """Count the prompts."""
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> "PackedPrompts": ...

    def __getitem__(self, index: int | slice) -> "Prompt | PackedPrompts":
        """Decode a prompt, or select some."""
        if isinstance(index, slice):
            return PackedPrompts(self.table, self.rows[index])
        row = self.rows[index]
        return Prompt(*(value_of(column[row]) for column in self.table.columns))


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order in which a store takes them, and how many were left out as too long.

    known: their fingerprint where it was worked out before; missing: prompts that sources of a mixture had too few of.
    """

    prompts: Sequence[Prompt]
    skipped: int
    known: str | None = field(default=None, compare=False)
    missing: Mapping[str, int] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        if isinstance(self.prompts, PackedPrompts):
            return pc.max(pc.list_value_length(self.prompts.table["prompt_ids"])).as_py()  # pyright: ignore
        return max(len(prompt.prompt_ids) for prompt in self.prompts)

    def fingerprint(self) -> str:
        """Hash every token of every prompt and completion."""
        return self.known or _fingerprint(self.prompts)


def _fingerprint(prompts: Iterable[Prompt]) -> str:
    """Hash the canonical text of the list of all prompts, one at a time."""
    total = hashlib.sha256(b"[")
    for index, prompt in enumerate(prompts):
        total.update(f"{',' if index else ''}{canonical(vars(prompt))}".encode())
    total.update(b"]")
    return total.hexdigest()


def kept(key: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, make: Callable[[], PromptSet]) -> PromptSet:
    """Return what ``make`` returned before for this key and tokenizer, or make it and keep it.

    Only a tokenizer that can be hashed whole has its prompts kept.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return make()
    name = sha256_of(canonical({**key, **_tokenizer_key(tokenizer), "format": FORMAT}))
    path = cache_dir() / "prompts" / f"{name[:32]}.arrow"
    if (found := _found(path)) is not None:
        return found
    made = make()
    with suppress(OSError):  # where the cache cannot be written, they are tokenized again next time
        _write(path, made)
        made = _found(path) or made
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


def _write(path: Path, found: PromptSet) -> None:
    packed = found.prompts if isinstance(found.prompts, PackedPrompts) else PackedPrompts.of(found.prompts)
    metadata = {"skipped": str(found.skipped), "fingerprint": found.fingerprint()}
    write_stream(path, SCHEMA.with_metadata(metadata), packed.table.to_batches())


def _found(path: Path) -> PromptSet | None:
    """Return what a file of the cache has; None where it is missing or not whole."""
    return _read(path, path.stat().st_ctime_ns) if path.is_file() else None


@lru_cache(maxsize=4)
def _read(path: Path, changed_ns: int) -> PromptSet | None:
    """Map a file of the cache, None if it is not whole. changed_ns: its time, so that a new one is mapped again."""
    if not all(known_files(path.parent, [path.name], whole_sha256)):
        return None
    table, _ = mapped_stream(path)
    skipped, fingerprint = (table.schema.metadata[name].decode() for name in (b"skipped", b"fingerprint"))
    return PromptSet(PackedPrompts.whole(table), int(skipped), fingerprint)
