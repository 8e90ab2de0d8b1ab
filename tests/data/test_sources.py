"""A kind of source is one entry of a dict; its fingerprint follows its rows."""

import json
from pathlib import Path

import datasets
import pytest

from kdctl.config.preset import PromptsSection
from kdctl.data import sources
from kdctl.data.prompts import PromptReader
from kdctl.data.sources import Bundled, HubDataset, LocalFile, open_source


class Counting:
    """Asks for sums: ``count:N`` has N rows."""

    def __init__(self, name: str, split: str, offline: bool):
        self.name, self.count = name, int(name.partition(":")[2])

    @staticmethod
    def takes(name: str) -> bool:
        return name.startswith("count:")

    def fingerprint(self) -> str:
        return str(self.count)

    def rows(self) -> list[dict]:
        return [{"prompt": f"{i} + {i} = ?"} for i in range(self.count)]


def test_each_name_is_of_one_kind():
    for name, kind in {
        "kdctl": Bundled,
        "a/b.jsonl": LocalFile,
        "x.json": LocalFile,
        "~/y.parquet": LocalFile,
        "owner/name": HubDataset,
        "kdctl/other": HubDataset,
        "file": HubDataset,
    }.items():
        assert type(open_source(name, "train")) is kind, name


def test_an_entry_is_all_that_a_new_kind_needs(tokenizer, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "count", Counting)
    settings = PromptsSection(train="count:5", heldout="kdctl")
    found = PromptReader(tokenizer, settings).train(9, 0).prompts
    assert sorted(tokenizer.decode(p.prompt_ids).split("\n")[1] for p in found) == [
        f"{i} + {i} = ?<|im_end|>" for i in range(5)
    ]


def test_fingerprint_of_a_file_follows_its_content(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    found = []
    for text in ("a", "b", "a"):
        path.write_text(json.dumps({"prompt": text}))
        found.append(open_source(str(path), "train").fingerprint())
    assert found[0] == found[2] != found[1]


def test_fingerprint_of_a_hub_set_is_that_of_its_revision(monkeypatch: pytest.MonkeyPatch):
    loaded = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        loaded.append((name, split))
        return datasets.Dataset.from_list([{"prompt": name}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    one, two = HubDataset("a/b", "train", True), HubDataset("a/c", "train", True)
    assert one.fingerprint() != two.fingerprint()
    assert list(one.rows()) == [{"prompt": "a/b"}]
    assert loaded == [("a/b", "train"), ("a/c", "train")], "each is loaded once"
