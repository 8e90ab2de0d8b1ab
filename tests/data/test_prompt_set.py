"""Prompts from the cache are those that the tokenizer makes, whatever the source, and a damaged file is made again."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow as pa
import pytest
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.config.preset import PromptsSection
from kdctl.config.resolve import canonical
from kdctl.data import prompts
from kdctl.data.prompt_set import PackedPrompts, sha256_of
from kdctl.data.prompts import PromptReader, PromptSet, messages_of, prompt_id, split_answer
from kdctl.data.sources import read_rows
from kdctl.run.records import Prompt


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache of its own; return the folder of prompts in it."""
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache" / "prompts"


def source(tmp_path: Path, count: int = 9) -> str:
    path = tmp_path / "data.jsonl"
    turns = [[{"role": "user", "content": f"é {i} " * (1 + i % 5)}] for i in range(count)]
    answered = [
        {"messages": [*t, {"role": "assistant", "content": f"<|im_end|>{i}" if i % 2 else "yes"}]}
        for i, t in enumerate(turns)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in answered))
    return str(path)


def ask(tokenizer: PreTrainedTokenizerBase, name: str, answers: bool = False, **changes: Any) -> PromptSet:
    return PromptReader(tokenizer, PromptsSection(train=name, **changes), offline=True).train(6, 1, answers)


def same(one: PromptSet, other: PromptSet) -> bool:
    return (list(one.prompts), one.skipped) == (list(other.prompts), other.skipped)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("tokenized again")


@pytest.mark.parametrize("answers", [False, True])
def test_batches_are_tokenized_as_rows_are_alone(tokenizer, tmp_path, monkeypatch, answers):
    name = source(tmp_path)
    alone = {}
    for row in read_rows(name, "train", True):
        messages, _ = split_answer(messages_of(row))
        head, whole = (
            str(tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=prompt))
            for m, prompt in ((messages, True), (row["messages"], False))
        )
        ids = tokenizer(whole[len(head) :], add_special_tokens=False)["input_ids"]
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
        alone[prompt_id(messages)] = tokenizer(head, add_special_tokens=False)["input_ids"], ids
    for size in (1, 2, 1024):
        monkeypatch.setattr(prompts, "BATCH", size)
        monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / f"cache{size}"))
        found = ask(tokenizer, name, answers)
        assert len(found.prompts) == 6
        for prompt in found.prompts:
            assert prompt.prompt_ids == alone[prompt.id][0]
            assert prompt.completion_ids == (alone[prompt.id][1] if answers else None)


def test_no_row_after_the_last_one_taken_is_looked_at(tokenizer, tmp_path):
    rows = list(read_rows(source(tmp_path, 40), "train", True))
    read = PromptReader(tokenizer, PromptsSection(), offline=True)
    order = [
        prompt.id for prompt in PromptReader(tokenizer, PromptsSection(train=source(tmp_path, 40))).train(40, 3).prompts
    ]
    bad = next(i for i, row in enumerate(rows) if prompt_id(split_answer(messages_of(row))[0]) == order[10])
    rows[bad] = {"messages": [{"role": "user"}]}
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = PromptReader(tokenizer, PromptsSection(train=str(path)), offline=True)
    assert [prompt.id for prompt in read.train(10, 3).prompts] == order[:10]
    with pytest.raises(ValueError, match="must have a role and a content"):
        read.train(11, 3)


@pytest.mark.parametrize("answers", [False, True])
def test_second_reading_takes_the_file_and_has_the_same_fingerprint(tokenizer, tmp_path, cache, monkeypatch, answers):
    name = source(tmp_path)
    first = ask(tokenizer, name, answers, max_prompt_tokens=35)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(PromptReader, "_take", refuse)
    second = ask(tokenizer, name, answers, max_prompt_tokens=35)
    assert same(second, first)
    assert isinstance(second.prompts, PackedPrompts)
    assert second.skipped > 0
    assert second.fingerprint() == PromptSet(list(first.prompts), first.skipped).fingerprint()


def test_whatever_decides_the_prompts_names_the_file(tokenizer, tmp_path, cache):
    name = source(tmp_path)
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("assistant", "model")
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["yes"])
    read = PromptReader(tokenizer, PromptsSection(train=name, heldout=name), offline=True)
    for count, make in enumerate(
        (
            lambda: ask(tokenizer, name),
            lambda: ask(tokenizer, name, True),
            lambda: ask(tokenizer, name, max_prompt_tokens=511),
            lambda: ask(other, name),
            lambda: ask(more, name),
            lambda: read.train(5, 1),
            lambda: read.train(6, 2),
            lambda: read.train(6, 1, heldout=frozenset({"x"})),
            lambda: ask(tokenizer, source(tmp_path, 8)),
        ),
        1,
    ):
        make()
        assert len(list(cache.iterdir())) == count


@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d[:-1], lambda d: d[:200] + b"!" + d[201:], lambda d: d[:20]]
)
def test_damaged_file_is_made_again(tokenizer, tmp_path, cache, damage):
    name = source(tmp_path)
    expected = ask(tokenizer, name)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.unlink()  # it is mapped
    path.write_bytes(damage(whole))
    os.utime(path, ns=(1, 1))
    assert same(ask(tokenizer, name), expected)
    assert path.read_bytes() == whole
    assert list(cache.iterdir()) == [path]


def test_fingerprint_is_the_hash_of_all_tokens():
    """Stores on disk name their prompts by it."""
    found = PromptSet([Prompt("p", 0, [1, 2]), Prompt("q", 1, [3], [4, 5])], 7)
    assert found.fingerprint() == "a15dd8a2646c80a732aaf1657499c7fc0a17ee91a98bf96d26c22d6fa865c8bf"


def test_packed_prompts_are_those_of_a_list_and_mapped_ones_take_no_memory(tokenizer, tmp_path):
    many = [Prompt(f"p{i}", i, [*range(i % 5 + 1)], [i, 7] if i % 3 else None) for i in range(2500)]
    packed = PackedPrompts.of(iter(many))
    assert list(packed) == many
    for part in (slice(3, 40), slice(None, None, -1), slice(9, 9), slice(2000, None, 7)):
        assert list(packed[part]) == many[part]
    found = PromptSet(packed, 0)
    assert found.longest == PromptSet(many, 0).longest == 5
    assert found.fingerprint() == PromptSet(many, 0).fingerprint() == sha256_of(canonical([vars(one) for one in many]))
    before = pa.total_allocated_bytes()
    mapped = ask(tokenizer, source(tmp_path)).prompts
    assert pa.total_allocated_bytes() - before < 1000
    assert len(mapped) == 6


def test_a_cache_that_cannot_be_used_costs_time_only(tokenizer, tmp_path, cache, monkeypatch):
    name = source(tmp_path)
    expected = ask(tokenizer, name)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "file"))
    assert same(ask(tokenizer, name), expected)
    monkeypatch.setenv("KDCTL_CACHE", str(cache.parent))
    for kept in list(cache.iterdir()):
        kept.unlink()
        kept.mkdir()
    assert same(ask(tokenizer, name), expected)
