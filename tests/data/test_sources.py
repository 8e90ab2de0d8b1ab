"""A kind of source is one entry of a dict; its fingerprint follows its rows."""

import bz2
import gzip
import json
import os
import re
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path

import datasets.config
import pytest

from kdctl.base.errors import DataError
from kdctl.config.preset import PromptsSection
from kdctl.data import sources
from kdctl.data.prompts import PromptReader
from kdctl.data.sources import Bundled, HubDataset, LocalFile, open_source, read_rows
from kdctl.data.text_files import check_text_file
from kdctl.run import hashes
from kdctl.run.files import sha256


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


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "folder"])
def test_archives_are_not_unpacked_whatever_they_are_called(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path / "extracted"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    path = tmp_path / (name if name != "folder" else "folder/p.zip")
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("member.jsonl", '{"prompt": "hello"}\n')
    with nullcontext() if name == "folder" else pytest.raises(DataError, match="archive"):
        open_source(str(tmp_path / name), "train", True).rows()  # of a folder's, members are read where they are
    assert not list(tmp_path.rglob("*member*"))


def test_a_loading_script_is_named_and_not_run(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "hello"}\n')
    with pytest.raises(DataError, match="scripts are no longer supported"):
        open_source(str(tmp_path / "data"), "train", True).rows()
    assert not (tmp_path / "ran").exists()


ROWS = [{"prompt": f"Größe {index}?"} for index in range(4)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
CSV = "\n".join(["prompt", *(row["prompt"] for row in ROWS)]).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.json.bz2", bz2.compress(json.dumps(ROWS).encode())),
        ("a.csv", CSV),
        ("a.TSV", CSV),
    ],
)
def test_files_are_read_by_their_ending(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [dict(row) for row in read_rows(str(tmp_path / name), "train")] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", LINES + b"\n" + '{"prompt": "Maß"}'.encode("latin-1"), "a.jsonl is not UTF-8 text in line 5"),
        ("a.csv", CSV + b"\n" + "Maß".encode("latin-1"), "a.csv is not UTF-8 text in line 6"),
        ("a.json", LINES.decode().encode("utf-16"), "not UTF-8 text in line 1"),
        ("a.jsonl", b'{"prompt": "a"}\n\0\0\0', "line 2"),
        ("a.txt", LINES, "of no kind that is read: .jsonl"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "cannot be unpacked"),
        ("a.parquet", b"PAR1" + bytes(40), "cannot be read"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt" "b"}\n', "a.jsonl cannot be read in line 3: this is no JSON"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"\n{}', mtime=0),
            "cannot be read in line 2: this",
        ),
        ("a.json", b'[\n{"prompt": "a"},\n{"prompt" "b"}\n]', "a.json cannot be read in line 3: this is no JSON"),
        ("a.json", b'{"prompt": "a"}\n{"prompt" "b"}\n', "a.json cannot be read in line 2: this is no JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": 5}\n', "line 3: prompt is a number, and in the lines before text"),
        ("a.csv", b'prompt\na\n"b\nc\n', "a.csv' (split 'train') cannot be read: a quote is not closed"),
    ],
)
def test_what_cannot_be_read_is_one_message_with_the_file(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(words)):
        read_rows(str(tmp_path / name), "train")


def test_a_name_that_no_file_can_have_is_not_asked_of_the_disk() -> None:
    with pytest.raises(DataError, match="no prompt file at"):
        read_rows("x" * 400 + ".jsonl", "train")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("https://example.org/a.jsonl", "is an address"),
        ("hf://datasets/a/b", "is an address"),
        ("*.jsonl", "patterns are not looked up"),
        ("folder.jsonl", "is no prompt file but a folder"),
        ("pipe.jsonl", "is no prompt file but a pipe"),
        ("gone.jsonl", "is no prompt file but a link that leads nowhere"),
        ("loop.jsonl", "is no prompt file but a link that leads nowhere"),
        ("null.jsonl.gz", "no prompt file at"),
        ("", "is no folder|no data|any data"),
    ],
)
def test_what_is_no_file_is_named_for_what_it_is(tmp_path: Path, monkeypatch, name: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    os.mkfifo("pipe.jsonl")
    Path("gone.jsonl").symlink_to("nothing")
    Path("loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(DataError, match=says):
        read_rows(name or ".", "train", offline=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_without_rows_says_so(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({"prompt": []}).to_parquet(path)
    else:
        path.write_text("\n \n")
    with pytest.raises(DataError, match="no rows"):
        read_rows(str(path), "train")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch) -> None:
    (path := tmp_path / "a.jsonl").write_bytes(LINES)
    (cache := tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    with pytest.raises(DataError, match=f"cannot be kept for reading in {cache}.*HF_HOME"):
        read_rows(str(path), "train")


def test_a_large_file_is_hashed_and_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    path, seen = tmp_path / "a.jsonl", []
    path.write_bytes(LINES)
    os.utime(path, (time.time() - 60, time.time() - 60))
    monkeypatch.setattr(hashes, "sha256", lambda path: seen.append("hashed") or sha256(path))
    monkeypatch.setattr(sources, "check_text_file", lambda path, kind: seen.append(kind) or check_text_file(path, kind))
    for _ in range(3):
        monkeypatch.setattr(hashes, "_KNOWN", {})
        source = LocalFile(str(path), "train", True)
        assert source.fingerprint() == sha256(path)
        assert [dict(row) for row in source.rows()] == ROWS
    assert seen == ["hashed", "json"]
    path.write_bytes(LINES + b"\n\xff")
    with pytest.raises(DataError, match="is not UTF-8 text in line 5"):
        source.rows()
