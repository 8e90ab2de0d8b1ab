"""Prompts and data-set completions: what is read, in which order, and where the loss will end."""

import copy
import json
import socket
from collections import Counter
from pathlib import Path

import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import DataError
from kdctl.config.preset import PromptsSection
from kdctl.config.resolve import load_preset
from kdctl.data.prompts import PromptReader, PromptSet, as_rollout, messages_of, prompt_id, split_answer
from kdctl.data.sources import read_rows
from kdctl.run.records import Prompt
from kdctl.stages.context import open_run
from kdctl.stages.rollout import train_prompts
from kdctl.stages.yardstick import heldout_prompts

EOS = 258


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what datasets converts out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[dict]) -> str:
    """Write rows as JSON lines or Parquet, after the file's suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reader(tokenizer: PreTrainedTokenizerBase, source: str, **settings) -> PromptReader:
    """Read training and held-out prompts from one source."""
    return PromptReader(tokenizer, PromptsSection(train=source, heldout=source, **settings), offline=True)


def questions(tmp_path: Path, count: int) -> str:
    return write(tmp_path / "questions.jsonl", [{"prompt": f"question {i}"} for i in range(count)])


# --- bundled prompts --------------------------------------------------------------------------------------------------


def test_bundled_prompts_have_even_kinds_and_no_overlap():
    train, heldout = read_rows("kdctl", "train"), read_rows("kdctl", "heldout")
    assert set(Counter(row["kind"] for row in train).values()) == {64}
    assert set(Counter(row["kind"] for row in heldout).values()) == {16}
    assert len(train) == 448
    assert len(heldout) == 112
    contents = Counter(prompt_id(messages_of(row)) for row in [*train, *heldout])
    assert set(contents.values()) == {1}
    assert len({row["id"] for row in [*train, *heldout]}) == 560


def test_bundled_prompts_end_with_the_user_and_alternate():
    for row in [*read_rows("kdctl", "train"), *read_rows("kdctl", "heldout")]:
        roles = [message["role"] for message in messages_of(row)]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], row["id"]
        assert all(message["content"].strip() for message in row["messages"]), row["id"]


def test_bundled_heldout_prompts_are_never_trained_on(tokenizer):
    bundled = reader(tokenizer, "kdctl")
    train, heldout = bundled.train(448, 0).prompts, bundled.heldout(112, 0).prompts
    assert (len(train), len(heldout)) == (448, 112)
    assert not {p.id for p in train} & {p.id for p in heldout}
    assert not {tuple(p.prompt_ids) for p in train} & {tuple(p.prompt_ids) for p in heldout}


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_prompt_decodes_to_the_templates_text(tokenizer, tmp_path, suffix, column):
    value = {"messages": [user("2 + 2 = ?")], "prompt": "2 + 2 = ?"}[column]
    source = write(tmp_path / f"data.{suffix}", [{column: value}])
    (prompt,) = reader(tokenizer, source).train(10, 0).prompts
    assert tokenizer.decode(prompt.prompt_ids) == "<|im_start|>user\n2 + 2 = ?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.completion_ids is None


def test_source_with_pattern_characters_in_its_name_is_read(tokenizer, tmp_path):
    source = write(tmp_path / "a[1]*?.jsonl", [{"prompt": "here"}])
    assert len(reader(tokenizer, source).train(1, 0).prompts) == 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_prompt_and_answer_decode_to_the_templates_text(tokenizer, tmp_path, suffix):
    turns = [user("hello"), assistant("hi"), user("2 + 2 = ?"), assistant("It is 4.")]
    source = write(tmp_path / f"data.{suffix}", [{"messages": turns}])
    (prompt,) = reader(tokenizer, source).train(1, 0, answers=True).prompts
    assert prompt.completion_ids is not None
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    assert tokenizer.decode(prompt.prompt_ids + prompt.completion_ids) == text.removesuffix("\n")
    assert tokenizer.decode(prompt.completion_ids) == "It is 4.<|im_end|>"
    assert tokenizer.decode(prompt.prompt_ids).count("<|im_end|>") == 3


def test_same_prompt_with_and_without_answer_is_one_prompt(tokenizer, tmp_path):
    rows = [{"messages": [user("q")]}, {"messages": [user("q"), assistant("a")]}, {"messages": [user("r")]}]
    source = write(tmp_path / "data.jsonl", rows)
    assert len(reader(tokenizer, source).train(10, 0).prompts) == 2
    (answered,) = reader(tokenizer, source).train(10, 0, answers=True).prompts
    assert answered.id == prompt_id([user("q")])
    assert answered.index == 0


# --- where an answer ends ---------------------------------------------------------------------------------------------


def test_answer_ends_with_its_first_end_of_sequence(tokenizer, tmp_path):
    source = write(tmp_path / "data.jsonl", [{"messages": [user("q"), assistant("one<|im_end|>two")]}])
    (prompt,) = reader(tokenizer, source).train(1, 0, answers=True).prompts
    assert tokenizer.decode(prompt.completion_ids) == "one<|im_end|>"


def test_answer_ends_with_the_first_of_all_stop_tokens():
    prompt = Prompt("p", 0, [1], [10, 11, 256, 12, EOS])
    assert as_rollout(prompt, 0, 99, (EOS,)).completion_ids == [10, 11, 256, 12, EOS]
    rollout = as_rollout(prompt, 0, 99, (256, EOS))
    assert rollout.completion_ids == [10, 11, 256]
    assert rollout.finish_reason == "stop"


def test_answer_cut_by_length_says_so_and_keeps_no_end():
    prompt = Prompt("p", 3, [1], [10, 11, 12, EOS])
    cut, whole = as_rollout(prompt, 5, 3, (EOS,)), as_rollout(prompt, 5, 4, (EOS,))
    assert (cut.completion_ids, cut.finish_reason) == ([10, 11, 12], "length")
    assert (whole.completion_ids, whole.finish_reason) == ([10, 11, 12, EOS], "stop")
    assert (cut.logprobs, cut.source, cut.seed, cut.prompt_index) == (None, "dataset", 5, 3)


def test_split_answer_takes_only_a_final_assistant_turn():
    assert split_answer([user("a"), assistant("b"), user("c")]) == ([user("a"), assistant("b"), user("c")], None)
    assert split_answer([user("a"), assistant("b")]) == ([user("a")], "b")


# --- which prompts, in which order ------------------------------------------------------------------------------------


def test_order_follows_the_seed(tokenizer, tmp_path):
    source = questions(tmp_path, 40)

    def order(seed: int, count: int = 40) -> list[str]:
        return [prompt.id for prompt in reader(tokenizer, source).train(count, seed).prompts]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2))
    assert order(1, 7) == order(1)[:7]
    assert order(1) != [prompt_id([user(f"question {i}")]) for i in range(40)]


def test_prompts_are_numbered_in_order(tokenizer, tmp_path):
    prompts = reader(tokenizer, questions(tmp_path, 10)).train(6, 0).prompts
    assert [prompt.index for prompt in prompts] == list(range(6))


def test_excluded_prompts_never_appear(tokenizer, tmp_path):
    read = reader(tokenizer, questions(tmp_path, 30))
    heldout = frozenset(prompt.id for prompt in read.heldout(12, 5).prompts)
    train = {prompt.id for prompt in read.train(30, 5, heldout=heldout).prompts}
    assert len(heldout) == 12
    assert len(train) == 18
    assert not train & heldout


@pytest.mark.parametrize("answers", [False, True])
def test_one_file_for_both_is_split(tiny_dir, tmp_path, answers):
    rows = [{"messages": [user(f"question {i}"), assistant("yes")]} for i in range(30)] * 2
    source = write(tmp_path / "data.jsonl", rows)
    settings = {"teacher.model": str(tiny_dir), "prompts.train": source, "prompts.heldout": source}
    run = open_run(load_preset("smoke", settings | {"rollout.num_prompts": 99}), tmp_path / "run")
    heldout = {prompt.id for prompt in heldout_prompts(*run).prompts}
    train = {prompt.id for prompt in train_prompts(*run, answers).prompts}
    assert len(heldout) == 16
    assert len(train) == 14
    assert not heldout & train


def test_too_long_prompts_are_skipped_and_counted(tokenizer, tmp_path):
    rows = [{"prompt": "x" * (10 if i % 3 else 100)} | {"n": i} for i in range(9)]
    rows = [{"prompt": f"{row['n']}{row['prompt']}"} for row in rows]
    source = write(tmp_path / "data.jsonl", rows)
    found = reader(tokenizer, source, max_prompt_tokens=60).train(9, 0)
    assert (len(found.prompts), found.skipped) == (6, 3)
    assert all(len(prompt.prompt_ids) <= 60 for prompt in found.prompts)
    longest = max(len(prompt.prompt_ids) for prompt in found.prompts)
    assert reader(tokenizer, source, max_prompt_tokens=longest).train(9, 0).skipped == 3
    with pytest.raises(DataError, match=rf"9 are longer than prompts\.max_prompt_tokens={longest - 1}"):
        reader(tokenizer, source, max_prompt_tokens=longest - 1).train(9, 0)


def test_fingerprint_follows_every_token_and_the_order(tokenizer, tmp_path):
    source = questions(tmp_path, 5)
    kept = reader(tokenizer, source).train(5, 0)
    prompts = list(kept.prompts)
    found = PromptSet(prompts, kept.skipped)
    before = found.fingerprint()
    assert kept.fingerprint() == before
    assert reader(tokenizer, source).train(5, 0).fingerprint() == before
    prompts[4].prompt_ids[-1] += 1
    assert found.fingerprint() != before
    prompts[4].prompt_ids[-1] -= 1
    assert found.fingerprint() == before
    prompts[0], prompts[1] = prompts[1], prompts[0]
    assert found.fingerprint() != before


# --- sources that cannot be used --------------------------------------------------------------------------------------

BAD_FILES = {
    "empty.jsonl": (b"", "is empty"),
    "empty.parquet": (b"", "is empty"),
    "blank.jsonl": (b"\n\n", "cannot be read"),
    "garbage.jsonl": (b"not json\n", "line 1: this is no JSON"),
    "garbage.parquet": (b"PAR1 not parquet", "cannot be read"),
    "columns.jsonl": (b'{"text": "x", "id": 1}\n', r"needs a column 'messages' or 'prompt', has \['id', 'text'\]"),
    "hole.jsonl": (b'{"prompt": "x"}\n{"prompt": null}\n', "neither messages nor a prompt"),
    "norole.jsonl": (b'{"messages": [{"content": "x"}]}\n', "must have a role and a content"),
    "text.jsonl": (b'{"messages": "x"}\n', "a list of role and content"),
    "null.jsonl": (b'{"messages": [{"role": "user", "content": null}]}\n', "must have a role and a content"),
    "parts.jsonl": (b'{"messages": [{"role": "user", "content": [{"image": "x"}]}]}\n', "both text"),
    "number.jsonl": (b'{"prompt": 5}\n', "prompts must be text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_file_is_one_line(tokenizer, tmp_path, name):
    content, match = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match) as caught:
        reader(tokenizer, str(tmp_path / name)).train(10, 0)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_missing_file_names_the_place(tokenizer, tmp_path, suffix):
    path = tmp_path / f"none.{suffix}"
    with pytest.raises(DataError, match="no prompt file at") as caught:
        reader(tokenizer, str(path)).train(1, 0)
    assert str(path) in str(caught.value)


def test_unknown_hub_set_offline_does_not_touch_the_network(tokenizer, monkeypatch):
    calls = []

    def refuse(*arguments, **_):
        calls.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(DataError, match=r"'kdctl-tests/no-such-set'.*cannot be read") as caught:
        reader(tokenizer, "kdctl-tests/no-such-set").train(1, 0)
    assert "\n" not in str(caught.value)
    assert calls == []


def test_bundled_prompts_have_no_other_split(tokenizer):
    with pytest.raises(DataError, match="split 'validation'"):
        reader(tokenizer, "kdctl", split="validation").train(1, 0)


def test_source_without_answers_is_refused_for_the_dataset_store(tokenizer, tmp_path):
    for source in ("kdctl", questions(tmp_path, 3)):
        with pytest.raises(DataError, match="no row that ends with an assistant's answer"):
            reader(tokenizer, source).train(10, 0, answers=True)


def test_source_that_is_held_out_entirely_says_so(tokenizer, tmp_path):
    rows = [{"messages": [user(f"q{i}"), assistant("a")]} for i in range(4)]
    read = reader(tokenizer, write(tmp_path / "data.jsonl", rows))
    heldout = frozenset(prompt.id for prompt in read.heldout(10, 0).prompts)
    for answers in (False, True):
        with pytest.raises(DataError, match=r"all 4 are held out; lower heldout\.num_prompts"):
            read.train(10, 0, answers, heldout)


def test_template_that_refuses_a_role_is_an_error_of_the_data(tokenizer, tmp_path):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    source = write(tmp_path / "data.jsonl", [{"messages": [{"role": "system", "content": "s"}, user("u")]}])
    with pytest.raises(DataError, match=r"refuses a conversation of system, user: no system"):
        reader(strict, source).train(1, 0)


def test_template_that_does_not_put_the_answer_after_the_prompt_is_refused(tokenizer, tmp_path):
    reversing = copy.deepcopy(tokenizer)
    reversing.chat_template = "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"
    source = write(tmp_path / "data.jsonl", [{"messages": [user("q"), assistant("a")]}])
    with pytest.raises(DataError, match="right after the prompt"):
        reader(reversing, source).train(1, 0, answers=True)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]}, ["ab"]),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            ["q", "a"],
        ),
        ({"prompt": 5}, "prompts must be text, and these are of int: 5"),
        ({"prompt": True}, "of bool"),
        ({"messages": {"role": ["user"], "content": ["q"]}}, "a list of role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "both text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "both text"),
        ({"messages": [["user", "q"]]}, "both text"),
        ({"prompt": [["q"]]}, "both text"),
        ({"prompt": "\ud83d"}, "not valid Unicode"),
    ],
)
def test_rows_of_other_shapes_are_messages_or_refused(row: dict, expected: object) -> None:
    if isinstance(expected, list):
        assert [message["content"] for message in messages_of(row)] == expected
    else:
        with pytest.raises(DataError, match=str(expected)):
            messages_of(row)


def test_a_row_that_is_no_prompt_is_named(tokenizer, tmp_path):
    (path := tmp_path / "a.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(DataError, match=r"row 1 of '.*a.jsonl': prompts must be text"):
        PromptReader(tokenizer, PromptsSection(train=str(path))).train(3, 0)


def test_rows_of_an_answer_alone_have_no_prompt(tokenizer, tmp_path):
    (path := tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    with pytest.raises(DataError, match="none of the 1 rows has a prompt"):
        PromptReader(tokenizer, PromptsSection(train=str(path))).train(3, 0)


def test_a_template_that_writes_the_same_for_all_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "hello"
    with pytest.raises(DataError, match="the same text for 3 different conversations: 'hello'"):
        PromptReader(other, PromptsSection()).train(3, 0)
