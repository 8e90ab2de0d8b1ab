"""Prompts of several sources in one order: keyed draws, columns, plain text, and what is in no mix."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets.config
import pyarrow as pa
import pytest
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import DataError
from kdctl.config.preset import PromptsSection
from kdctl.config.resolve import load_preset
from kdctl.data.mixture import drawn, source_of
from kdctl.data.prompts import PromptReader, rows_of
from kdctl.run.records import Prompt

WORDS = "alpha beta gamma delta epsilon zeta eta theta"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def sources(folder: Path) -> list[dict]:
    """Write rows of chat, questions with answers, and plain text, each in columns of other names."""
    rows = {
        "chat.jsonl": [{"prompt": f"chat {i}"} for i in range(200)],
        "asked.jsonl": [{"question": f"asked {i}", "reply": f"so {i}"} for i in range(200)],
        "plain.jsonl": [{"body": f"{i} {WORDS}", "n": i} for i in range(200)] + [{"body": " ", "n": 0}, {"body": None}],
    }
    for name, some in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    return [
        {"source": str(folder / "chat.jsonl"), "weight": 2},
        {"source": str(folder / "asked.jsonl"), "columns": {"prompt": "question", "answer": "reply"}},
        {"source": str(folder / "plain.jsonl"), "columns": {"text": "body"}, "prompt_tokens": 12},
    ]


def reader(tokenizer: PreTrainedTokenizerBase, folder: Path, **settings: object) -> PromptReader:
    section = PromptsSection.model_validate({"train": sources(folder), **settings})
    return PromptReader(tokenizer, section, offline=True)


def by_source(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for prompt in prompts:
        found.setdefault(source_of(prompt.id), []).append(prompt.id)
    return found


def test_draws_have_the_weights_and_depend_on_seed_and_place_alone() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    many = drawn(weights, 8000, 3)
    counts = Counter(many)
    chi_square = sum((counts[name] - 1000 * weight) ** 2 / (1000 * weight) for name, weight in weights.items())
    assert chi_square < 13.8  # 0.999 of two degrees of freedom
    assert drawn(weights, 500, 3) == many[:500]
    assert drawn({name: 7 * weight for name, weight in weights.items()}, 500, 3) == many[:500]
    assert drawn(weights, 500, 4) != many[:500]


def test_a_source_gives_the_same_prompts_to_every_mix(tokenizer, tmp_path) -> None:
    first = by_source(reader(tokenizer, tmp_path).train(120, 5).prompts)
    other = by_source(reader(tokenizer, tmp_path, mix="chat:1,plain:3").train(120, 5).prompts)
    assert set(first) == {"chat", "asked", "plain"}
    assert set(other) == {"chat", "plain"}
    for name in other:
        shorter, longer = sorted((first[name], other[name]), key=len)
        assert longer[: len(shorter)] == shorter
    assert len(other["plain"]) > len(first["plain"])


def test_more_prompts_begin_with_the_fewer(tokenizer, tmp_path) -> None:
    read = reader(tokenizer, tmp_path)
    few, many = read.train(40, 5).prompts, read.train(120, 5).prompts
    assert list(many[:40]) == list(few)
    assert [prompt.index for prompt in many] == list(range(120))


def test_columns_are_read_by_the_names_that_the_preset_gives(tokenizer, tmp_path) -> None:
    found = reader(tokenizer, tmp_path, mix="asked:1").train(20, 0, answers=True).prompts
    for prompt in found:
        asked = str(tokenizer.decode(prompt.prompt_ids))
        number = asked.partition("asked ")[2].partition("<")[0].strip()
        assert number.isdigit()
        assert f"so {number}" in str(tokenizer.decode(prompt.completion_ids or []))


def test_plain_text_is_cut_without_a_template_and_what_follows_is_its_answer(tokenizer, tmp_path) -> None:
    read = reader(tokenizer, tmp_path, mix="plain:1")
    found = read.train(200, 0, answers=True)
    texts = {f"{i} {WORDS}" for i in range(200)}
    for prompt in found.prompts:
        assert len(prompt.prompt_ids) == 12
        assert str(tokenizer.decode([*prompt.prompt_ids, *(prompt.completion_ids or [])])) in texts
    assert len(found.prompts) == 200  # blank rows are passed over
    assert [prompt.prompt_ids for prompt in read.train(200, 0).prompts] == [one.prompt_ids for one in found.prompts]


def test_half_of_a_short_text_is_its_prompt(tokenizer, tmp_path) -> None:
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"t": "abcdefgh"[:n]}) + "\n" for n in (1, 2, 3, 8)))
    train = [{"source": str(tmp_path / "short.jsonl"), "columns": {"text": "t"}}]
    found = PromptReader(tokenizer, PromptsSection.model_validate({"train": train}), True).train(9, 0, answers=True)
    lengths = sorted((len(one.prompt_ids), len(one.completion_ids or [])) for one in found.prompts)
    assert lengths == [(1, 0), (1, 1), (1, 2), (4, 4)]


def test_text_of_no_token_is_no_prompt(tokenizer, tmp_path) -> None:
    rows = [{"t": tokenizer.eos_token}, {"t": "words to go on from"}]
    (tmp_path / "ends.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [{"source": str(tmp_path / "ends.jsonl"), "columns": {"text": "t"}}]
    found = PromptReader(tokenizer, PromptsSection.model_validate({"train": train}), True).train(9, 0)
    assert [bool(prompt.prompt_ids) for prompt in found.prompts] == [True]
    (tmp_path / "ends.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match="has text in 't' that makes tokens"):
        PromptReader(tokenizer, PromptsSection.model_validate({"train": train}), True).train(9, 0)


def test_a_missing_answer_matters_only_where_answers_are_read(tokenizer, tmp_path) -> None:
    rows = [{"q": "one", "r": None}, {"q": "two", "r": "yes"}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [{"source": str(tmp_path / "some.jsonl"), "columns": {"prompt": "q", "answer": "r"}}]
    read = PromptReader(tokenizer, PromptsSection.model_validate({"train": train}), True)
    assert len(read.train(9, 0).prompts) == 2
    assert len(read.train(9, 0, answers=True).prompts) == 1


def test_a_source_that_runs_out_is_counted_and_the_order_of_the_others_stays(tokenizer, tmp_path) -> None:
    whole = reader(tokenizer, tmp_path).train(600, 1)
    assert set(whole.missing) == {"chat"}
    assert len(whole.prompts) == 600 - whole.missing["chat"]
    drawn_names = drawn({"chat": 2.0, "asked": 1.0, "plain": 1.0}, 600, 1)
    kept = [source_of(prompt.id) for prompt in whole.prompts]
    assert [name for name in kept if name != "chat"] == [name for name in drawn_names if name != "chat"]


def test_no_prompt_is_held_out_or_comes_from_two_sources(tokenizer, tmp_path) -> None:
    listed = sources(tmp_path)
    listed.append({"source": listed[0]["source"], "name": "again"})
    section = PromptsSection.model_validate({"train": listed, "heldout": listed[0]["source"]})
    read = PromptReader(tokenizer, section, offline=True)
    heldout = frozenset(prompt.id for prompt in read.heldout(50, 9).prompts)
    names = [prompt.id.rpartition(":")[2] for prompt in read.train(200, 1, heldout=heldout).prompts]
    assert not heldout & {*names}
    assert len(names) == len({*names})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": {"text": "story"}}, "no column 'story', which the preset names"),
        ({"columns": {"text": "n"}}, "n must be text to be continued"),
        ({"source": "pkg:no_such_package/x.arrow"}, "no package 'no_such_package'"),
        ({"source": "pkg:kdctl/data/no.jsonl"}, "package 'kdctl' has no 'data/no.jsonl'"),
    ],
)
def test_a_source_that_cannot_be_read_so_says_why(tokenizer, tmp_path, change, said) -> None:
    train = [{**sources(tmp_path)[2], **change}]
    read = PromptReader(tokenizer, PromptsSection.model_validate({"train": train}), offline=True)
    with pytest.raises(DataError, match=said):
        read.train(5, 0)


def test_a_source_may_be_an_arrow_file_in_a_package(tokenizer, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "kdctl_rows"
    folder.mkdir()
    (folder / "__init__.py").touch()
    table = pa.table({"prompt": [f"row {i}" for i in range(20)]})
    with pa.ipc.new_stream(folder / "rows.arrow", table.schema) as file:
        file.write_table(table)
    monkeypatch.syspath_prepend(tmp_path)
    section = PromptsSection(train="pkg:kdctl_rows/rows.arrow")
    assert len(PromptReader(tokenizer, section, offline=True).train(20, 0).prompts) == 20


@pytest.mark.slow
def test_nothing_that_the_study_evaluates_is_in_its_mix() -> None:
    from kdctl.eval.tasks import build_tasks
    from kdctl.sweep.space import read_sweep

    length = 13  # words in a row, as contamination is commonly looked for (Brown et al. 2020, appendix C)

    def runs(value: object) -> set[int]:
        """Hash every run of so many words in text, or in what holds text."""
        if isinstance(value, dict):
            return set().union(*map(runs, value.values()))
        if isinstance(value, list):
            return set().union(*map(runs, value))
        words = str(value).lower().split() if isinstance(value, str) else []
        return {hash(tuple(words[i : i + length])) for i in range(len(words) - length + 1)}

    sweep = read_sweep("study_mix")
    preset = load_preset(sweep.preset or "", sweep.settings)
    evaluated: set[int] = set()
    for task in build_tasks(preset.eval, offline=True).values():
        for part in task.subtasks.values():
            for document in part.eval_docs:
                evaluated |= runs(dict(document))
    assert len(evaluated) > 500_000
    for source in preset.prompts.sources:
        columns = [*source.columns.values()] or ["messages"]
        found = [runs({name: row[name] for name in columns}) for row in rows_of(source, offline=True)]
        assert not any(evaluated & one for one in found), source.label
        assert any(found)
