"""Chat prompts and data-set completions, tokenized.

A source is ``kdctl`` (the bundled prompts), a Hub data set id, or a local ``.jsonl`` or ``.parquet`` file with a column
``messages`` (a list of role and content) or ``prompt`` (text).
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import DataError
from kdctl.base.rng import permutation
from kdctl.config.preset import PromptsSection
from kdctl.config.resolve import canonical
from kdctl.run.records import Message, Prompt, Rollout
from kdctl.system.patches import hub_offline

Row = dict[str, Any]
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order in which a store takes them, and how many were left out as too long."""

    prompts: list[Prompt]
    skipped: int

    def fingerprint(self) -> str:
        """Hash every token of every prompt and completion."""
        return hashlib.sha256(canonical([vars(prompt) for prompt in self.prompts]).encode()).hexdigest()


def read_rows(source: str, split: str, offline: bool = False) -> Sequence[Row]:
    """Read a source's rows. Raises DataError if it cannot be read or is empty."""
    if source == "kdctl":
        text = files("kdctl").joinpath("data/prompts.jsonl").read_text(encoding="utf-8")
        rows: Sequence[Row] = [row for row in map(json.loads, text.splitlines()) if row["split"] == split]
    else:
        rows = _load_dataset(source, split, offline)
    if len(rows) == 0:
        raise DataError(f"prompts from {source!r} (split {split!r}): no rows; there is nothing to generate from")
    columns = set(rows[0])
    if not columns & {"messages", "prompt"}:
        raise DataError(f"prompts from {source!r}: needs a column 'messages' or 'prompt', has {sorted(columns)}")
    return rows


def _load_dataset(source: str, split: str, offline: bool) -> Any:
    path = Path(source).expanduser()
    kind = FORMATS.get(path.suffix)
    if kind and not path.is_file():
        raise DataError(f"no prompt file at {path.absolute()}")
    if kind and path.stat().st_size == 0:
        raise DataError(f"the prompt file {path.absolute()} is empty; there is nothing to generate from")
    import datasets  # 0.1 GiB that kdctl's own prompts do not need
    from datasets.exceptions import DatasetGenerationError

    try:
        if kind:  # escaped, because datasets takes a path for a pattern
            return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train")
        with hub_offline(offline):
            return datasets.load_dataset(source, split=split)
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise DataError(f"data set {source!r} (split {split!r}) cannot be read: {reason}") from None


def messages_of(row: Row) -> list[Message]:
    """Return a row's conversation. Raises DataError if it is empty or not text."""
    messages = row.get("messages")
    if not messages:
        if not row.get("prompt"):
            raise DataError("a row has neither messages nor a prompt; remove empty rows from the data set")
        messages = [{"role": "user", "content": row["prompt"]}]
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"a message must have a role and a content, both text; this one is {message!r:.200}")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def split_answer(messages: list[Message]) -> tuple[list[Message], str | None]:
    """Separate the final assistant message, if there is one, from the prompt before it."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None


def prompt_id(messages: list[Message]) -> str:
    """Name a prompt by its content, 16 hex digits."""
    return hashlib.sha256(canonical(messages).encode()).hexdigest()[:16]


class PromptReader:
    """Turns rows into prompts with one model's tokenizer and chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: PromptsSection, offline: bool = False):
        self.tokenizer = tokenizer
        self.settings = settings
        self.offline = offline

    def train(self, count: int, seed: int, answers: bool = False, heldout: frozenset[str] = frozenset()) -> PromptSet:
        """Take ``count`` training prompts in an order given by ``seed``, none of the ids in ``heldout``.

        With ``answers`` only rows that bring an assistant's answer count. Raises DataError if there are none.
        """
        rows = read_rows(self.settings.train, self.settings.split, self.offline)
        return self._take(rows, count, seed, answers, heldout)

    def heldout(self, count: int, seed: int) -> PromptSet:
        """Take ``count`` held-out prompts."""
        rows = read_rows(self.settings.heldout, self.settings.heldout_split, self.offline)
        return self._take(rows, count, seed, False, frozenset())

    def _take(self, rows: Sequence[Row], count: int, seed: int, answers: bool, excluded: frozenset[str]) -> PromptSet:
        prompts: list[Prompt] = []
        seen, skipped, held = set(excluded), 0, 0
        for row in self._shuffled(rows, seed):
            messages, answer = split_answer(messages_of(row))
            name = prompt_id(messages)
            if not messages or (answers and answer is None):
                continue
            held += name in excluded
            if name in seen:
                continue
            seen.add(name)
            prompt = self._tokenize(name, len(prompts), messages, answer if answers else None)
            if len(prompt.prompt_ids) > self.settings.max_prompt_tokens:
                skipped += 1
                continue
            prompts.append(prompt)
            if len(prompts) == count:
                break
        if not prompts:
            raise DataError(self._nothing(answers, skipped, held))
        return PromptSet(prompts, skipped)

    def _nothing(self, answers: bool, skipped: int, held: int) -> str:
        if held and not skipped:
            return (
                f"no prompt of prompts.train={self.settings.train!r} is left: all {held} are held out; lower "
                "heldout.num_prompts or name another source in prompts.heldout"
            )
        if answers and not skipped:
            return (
                f"prompts.train={self.settings.train!r} has no row that ends with an assistant's answer, which "
                "--source dataset needs; use --source teacher to have the teacher write them"
            )
        return (
            f"no prompt is left: {skipped} are longer than prompts.max_prompt_tokens="
            f"{self.settings.max_prompt_tokens}; raise it or use other prompts"
        )

    @staticmethod
    def _shuffled(rows: Sequence[Row], seed: int) -> Iterator[Row]:
        for index in permutation(len(rows), "prompts", seed):
            yield rows[int(index)]

    def _tokenize(self, name: str, index: int, messages: list[Message], answer: str | None) -> Prompt:
        head = self._render(messages, True)
        ids = self._encode(head)
        if answer is None:
            return Prompt(name, index, ids)
        whole = self._render([*messages, {"role": "assistant", "content": answer}], False)
        if not whole.startswith(head):
            raise DataError(
                "the chat template does not put the answer right after the prompt; data-set completions "
                "cannot be cut out of it, use --source teacher"
            )
        return Prompt(name, index, ids, self._until_stop(self._encode(whole[len(head) :])))

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        template = self.tokenizer.apply_chat_template
        try:
            return str(template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the teacher's chat template refuses a conversation of {roles}: {error}; use other prompts"
            ) from None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]

    def _until_stop(self, ids: list[int]) -> list[int]:
        stop = self.tokenizer.eos_token_id
        return ids[: ids.index(stop) + 1] if stop in ids else ids


def as_rollout(prompt: Prompt, seed: int, max_new_tokens: int, stop: Sequence[int]) -> Rollout:
    """Store a data-set answer as a rollout, up to its first stop token; no model wrote it, so it has no logprobs."""
    completion = (prompt.completion_ids or [])[:max_new_tokens]
    ends = [place for place, token in enumerate(completion, 1) if token in stop]
    completion = completion[: ends[0]] if ends else completion
    return Rollout(
        prompt_id=prompt.id,
        prompt_index=prompt.index,
        sample_index=0,
        prompt_ids=prompt.prompt_ids,
        completion_ids=completion,
        logprobs=None,
        finish_reason="stop" if completion and completion[-1] in stop else "length",
        policy_step=0,
        seed=seed,
        source="dataset",
    )
