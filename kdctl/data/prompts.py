"""Chat prompts and data-set completions, tokenized."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import islice
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import DataError
from kdctl.base.rng import permutation
from kdctl.config.mixture import MixedSource
from kdctl.config.preset import PromptsSection
from kdctl.config.resolve import canonical
from kdctl.data.mixture import drawn, interleaved
from kdctl.data.prompt_set import PackedPrompts, PromptSet, kept, sha256_of
from kdctl.data.sources import Row, open_source, read_rows, row_of
from kdctl.data.templates import rendered, writes_date
from kdctl.run.records import Message, Prompt, Rollout

BATCH = 1024
"""Texts that the tokenizer is given at once."""


@dataclass(frozen=True)
class Asked:
    """Which prompts of a source: ``count`` in an order given by ``seed``, none ``excluded``.

    answers: only rows that bring an assistant's answer count, and it is tokenized too.
    """

    source: MixedSource
    count: int
    seed: int
    answers: bool = False
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Text:
    """A prompt before it is tokenized, and the answer where it is asked for; plain text whole, to be cut in tokens."""

    name: str
    head: str
    answer: str | None = None


def messages_of(row: Row) -> list[Message]:
    """Return a row's conversation. Raises DataError if it is empty or not text."""
    messages, prompt = row.get("messages"), row.get("prompt")
    if not messages:
        if not prompt:
            raise DataError("a row has neither messages nor a prompt; remove empty rows from the data set")
        if not isinstance(prompt, str | list):
            raise DataError(f"prompts must be text, and these are of {type(prompt).__name__}: {prompt!r:.100}")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*messages, *_listed(row.get("completion"))] if isinstance(prompt, list) else messages
    if not isinstance(messages, list):
        raise DataError(f"messages must be a list of role and content; these are {messages!r:.200}")
    return [_message(one) for one in messages]


def _listed(value: object) -> list[Any]:
    """Return the messages of a completion, where it is given as messages."""
    return value if isinstance(value, list) else []


def _message(found: object) -> Message:
    """Return a message of text; parts of text are joined."""
    role, content = (found.get("role"), found.get("content")) if isinstance(found, dict) else (None, None)
    if isinstance(content, list) and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"a message must have a role and a content, both text; this one is {found!r:.200}")
    try:
        (role + content).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"a message is not valid Unicode: {error}; {content!r:.100}") from None
    return {"role": role, "content": content}


def split_answer(messages: list[Message]) -> tuple[list[Message], str | None]:
    """Separate the final assistant message, if there is one, from the prompt before it."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None


def prompt_id(messages: list[Message]) -> str:
    """Name a prompt by its content, 16 hex digits."""
    return sha256_of(canonical(messages))[:16]


class PromptReader:
    """Turns rows into prompts with one model's tokenizer and chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: PromptsSection, offline: bool = False):
        self.tokenizer = tokenizer
        self.settings = settings
        self.offline = offline
        self.day = settings.date or date.today().isoformat()

    def train(self, count: int, seed: int, answers: bool = False, heldout: frozenset[str] = frozenset()) -> PromptSet:
        """Take ``count`` training prompts in an order given by ``seed``, none of the ids in ``heldout``.

        Prompts of several sources come in keyed draws by their weights. With ``answers`` only rows that bring an
        assistant's answer count. Raises DataError if there are none.
        """
        sources = self.settings.sources
        if not self.settings.is_mixture:
            return self._kept(Asked(sources[0], count, seed, answers, heldout))
        draws = drawn({source.label: source.weight for source in sources}, count, seed)
        found: dict[str, PromptSet] = {}
        for source in sources:
            if wanted := draws.count(source.label):
                found[source.label] = self._kept(Asked(source, wanted, seed, answers, heldout))
                heldout |= {prompt.id for prompt in found[source.label].prompts}
        return interleaved(found, draws)

    def heldout(self, count: int, seed: int) -> PromptSet:
        """Take ``count`` held-out prompts."""
        source = MixedSource(source=self.settings.heldout, split=self.settings.heldout_split)
        return self._kept(Asked(source, count, seed))

    def _kept(self, asked: Asked) -> PromptSet:
        """Return what was tokenized before, or tokenize and keep it."""
        source = asked.source
        rows = open_source(source.source, source.split, self.offline)
        key = {
            "source": [source.model_dump(exclude={"name", "weight"}), rows.fingerprint()],
            "asked": [asked.count, asked.seed, asked.answers, sorted(asked.excluded)],
            "max_prompt_tokens": self.settings.max_prompt_tokens,
            "day": self.day if writes_date(self.tokenizer) else None,
        }
        return kept(key, self.tokenizer, lambda: self._take(rows_of(source, self.offline), asked))

    def _take(self, rows: Sequence[Row], asked: Asked) -> PromptSet:
        skipped: list[int] = []
        prompts = PackedPrompts.of(self._fitting(rows, asked, skipped))
        if not prompts:
            raise DataError(self._nothing(rows, asked, sum(skipped)))
        return PromptSet(prompts, sum(skipped))

    def _fitting(self, rows: Sequence[Row], asked: Asked, skipped: list[int]) -> Iterator[Prompt]:
        """Yield prompts that are short enough, and count in ``skipped`` those that are not."""
        texts, count = self._texts(rows, asked), 0
        # No more texts are taken than prompts are missing, so that no row is looked at that is not needed.
        while part := list(islice(texts, min(BATCH, asked.count - count))):
            _check_differ(part)
            found = self._tokenized(part, asked)
            fitting = [prompt for prompt in found if 0 < len(prompt.prompt_ids) <= self.settings.max_prompt_tokens]
            yield from (replace(prompt, index=index) for index, prompt in enumerate(fitting, count))
            count += len(fitting)
            skipped.append(len(found) - len(fitting))

    def _texts(self, rows: Sequence[Row], asked: Asked) -> Iterator[Text]:
        """Render each row that counts, once."""
        seen = set(asked.excluded)
        for row in _prompt_rows(rows, asked):
            name = row.name
            if name not in seen:
                seen.add(name)
                answer = row.answer if asked.answers else None
                yield Text(name, row.text) if row.text else self._rendered(name, row.messages, answer)

    def _nothing(self, rows: Sequence[Row], asked: Asked, skipped: int) -> str:
        held = sum(row.name in asked.excluded for row in _prompt_rows(rows, asked))
        whose = asked.source.source
        if held and not skipped:
            why = "held out, or brought by a source before it" if self.settings.is_mixture else "held out"
            return (
                f"no prompt of prompts.train={whose!r} is left: all {held} are {why}; lower heldout.num_prompts or "
                "name another source in prompts.heldout"
            )
        if asked.source.is_text:
            return (
                f"none of the {len(rows)} rows of {whose!r} has text in {asked.source.columns['text']!r} that makes "
                f"tokens to go on from, at most prompts.max_prompt_tokens={self.settings.max_prompt_tokens}"
            )
        if not skipped and not asked.answers:
            return (
                f"none of the {len(rows)} rows has a prompt: each is an assistant's message alone; the messages before "
                "it are the prompt"
            )
        if asked.answers and not skipped:
            return (
                f"prompts.train={whose!r} has no row that ends with an assistant's answer, and a "
                "data set's own completions are such answers; off_policy_source = 'teacher', or --source teacher of "
                "kdctl rollout, has the teacher write them"
            )
        return (
            f"no prompt is left: {skipped} are longer than prompts.max_prompt_tokens="
            f"{self.settings.max_prompt_tokens}; raise it or use other prompts"
        )

    def _rendered(self, name: str, messages: list[Message], answer: str | None) -> Text:
        head = self._render(messages, True)
        if answer is None:
            return Text(name, head)
        whole = self._render([*messages, {"role": "assistant", "content": answer}], False)
        if not whole.startswith(head):
            raise DataError(
                "the chat template does not put the answer right after the prompt; data-set completions "
                "cannot be cut out of it: have the teacher write them (off_policy_source = 'teacher')"
            )
        return Text(name, head, whole[len(head) :])

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return rendered(self.tokenizer, messages, add_generation_prompt, self.day)

    def _tokenized(self, texts: Sequence[Text], asked: Asked) -> list[Prompt]:
        """Tokenize prompts, and answers up to their end, as the tokenizer would one by one."""
        if asked.source.is_text:
            return [self._cut(text, asked) for text in texts]
        heads = self._encode([text.head for text in texts])
        if not all(heads):
            raise DataError(
                "the teacher's chat template writes nothing for a conversation; mend it, or use other prompts"
            )
        answers = iter(self._encode([text.answer for text in texts if text.answer is not None]))
        return [
            Prompt(text.name, 0, ids, None if text.answer is None else self._until_stop(next(answers)))
            for text, ids in zip(texts, heads, strict=True)
        ]

    def _cut(self, text: Text, asked: Asked) -> Prompt:
        """Tokenize plain text, with what the tokenizer puts before any, and cut it into prompt and answer."""
        ids = list(self.tokenizer(text.head)["input_ids"])  # pyright: ignore[reportArgumentType]
        ids = ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids
        place = max(1, min(asked.source.prompt_tokens, len(ids) // 2))
        return Prompt(text.name, 0, ids[:place], ids[place:] if asked.answers else None)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]

    def _until_stop(self, ids: list[int]) -> list[int]:
        stop = self.tokenizer.eos_token_id
        return ids[: ids.index(stop) + 1] if stop in ids else ids


def _check_differ(texts: Sequence[Text]) -> None:
    """Raise DataError if a chat template writes the same for all conversations."""
    if len(texts) > 1 and len({text.head for text in texts}) == 1:
        raise DataError(
            f"the teacher's chat template writes the same text for {len(texts)} different conversations: "
            f"{texts[0].head!r:.200}; it leaves out what they say. Mend it, or use other prompts"
        )


@dataclass(frozen=True)
class PromptRow:
    """What a row brings: a conversation and maybe its answer, or plain text."""

    messages: list[Message]
    answer: str | None
    text: str = ""

    @property
    def name(self) -> str:
        """Name of its prompt."""
        return sha256_of(self.text)[:16] if self.text else prompt_id(self.messages)


def rows_of(source: MixedSource, offline: bool) -> Sequence[Row]:
    """Read a source's rows. Raises DataError if it cannot be read, is empty or holds no prompts."""
    return read_rows(source.source, source.split, offline, source.columns.values())


def prompt_row(row: Row, source: MixedSource) -> PromptRow | None:
    """Return what a row brings, None where that is no prompt. Raises DataError for what is not text."""
    columns = source.columns
    if source.is_text:
        text = row[columns["text"]] or ""
        if not isinstance(text, str):
            raise DataError(f"{columns['text']} must be text to be continued, and this is {text!r:.100}")
        return PromptRow([], None, text) if text.strip() else None
    messages = messages_of(_renamed(row, source.columns) if columns else row)
    if "answer" in columns and row[columns["answer"]] is not None:
        messages.append(_message({"role": "assistant", "content": row[columns["answer"]]}))
    messages, answer = split_answer(messages)
    return PromptRow(messages, answer) if messages else None


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the columns that a conversation is read from, by their usual names."""
    kinds = ("messages",) if "messages" in columns else ("prompt",)
    return {kind: row.get(columns.get(kind, kind)) for kind in kinds}


def _prompt_rows(rows: Sequence[Row], asked: Asked) -> Iterator[PromptRow]:
    """Yield what rows bring, in the order of a seed; with ``answers`` only where there is one."""
    for index in permutation(len(rows), "prompts", asked.seed):
        try:
            found = prompt_row(row_of(rows, int(index)), asked.source)
        except DataError as error:
            raise DataError(f"row {index + 1} of {asked.source.source!r}: {error}") from None
        if found is not None and not (asked.answers and found.answer is None and not found.text):
            yield found


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
