"""A store is whole or it is not used; equal rollouts are equal bytes."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdctl.base.errors import StoreError
from kdctl.base.sums import without_sum
from kdctl.rollout import shard as shards
from kdctl.rollout import store as store_module
from kdctl.rollout.store import RolloutStore
from kdctl.run import hashes, streams
from kdctl.run.files import sha256
from kdctl.run.records import Rollout, SamplingRecord, StoreManifest
from tests.leftovers import dead_process, left_by

IDENTITY = "0123456789abcdef"
SAMPLING = SamplingRecord(temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=2, max_new_tokens=8, seed=3)


def rollout(index: int, **changes) -> Rollout:
    """Make a rollout whose numbers all differ from its neighbours'."""
    tokens = [index + 7 * j for j in range(1 + index % 5)]
    made = Rollout(
        prompt_id=f"{index:016x}",
        prompt_index=index,
        sample_index=index % 2,
        prompt_ids=list(range(index, index + 4)),
        completion_ids=tokens,
        logprobs=[-0.25 * (j + index) for j in range(len(tokens))],
        finish_reason="stop" if index % 2 else "length",
        policy_step=0,
        seed=2**40 + index,
        source="student",
    )
    return dataclasses.replace(made, **changes)


BLOCKS = [[rollout(i) for i in range(start, start + 3)] for start in (0, 3, 6)]
MANY = [rollout(i, logprobs=None) if i % 3 == 1 else rollout(i) for i in range(2500)]


def write(path: Path, blocks=BLOCKS, identity: str = IDENTITY) -> RolloutStore:
    """Write a whole store."""
    store = RolloutStore(path)
    shards = tuple(store.write_shard(index, block, identity) for index, block in enumerate(blocks))
    store.finish(manifest_of(shards, identity))
    return store


def manifest_of(shards=(), identity: str = IDENTITY) -> StoreManifest:
    return StoreManifest(source="student", identity=identity, writer="w" * 64, sampling=SAMPLING, shards=tuple(shards))


def kept(store: RolloutStore, index: int, identity: str = IDENTITY):
    """Ask for the shard of a block."""
    return store.kept_shard(index, identity, [(one.prompt_index, one.sample_index) for one in BLOCKS[index]])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


# --- what goes in comes out -------------------------------------------------------------------------------------------


def test_reading_returns_what_was_written_in_order(tmp_path):
    store = write(tmp_path / "s")
    assert list(store.read()) == [item for block in BLOCKS for item in block]


def test_dataset_completions_keep_their_missing_logprobs(tmp_path):
    store = write(tmp_path / "s", [[rollout(0, logprobs=None, source="dataset"), rollout(1)]])
    assert [item.logprobs is None for item in store.read()] == [True, False]


def test_manifest_counts_rows_and_tokens(tmp_path):
    manifest = write(tmp_path / "s").manifest()
    assert manifest.rows == 9
    assert manifest.completion_tokens == sum(len(item.completion_ids) for block in BLOCKS for item in block)
    assert manifest.sampling == SAMPLING
    assert [shard.file for shard in manifest.shards] == [f"shard-0000{i}.arrow" for i in range(3)]
    for shard in manifest.shards:
        assert shard.sha256 == sha256(tmp_path / "s" / shard.file)


def test_shards_open_with_datasets(tmp_path):
    write(tmp_path / "s")
    files = sorted(str(path) for path in (tmp_path / "s").glob("*.arrow"))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    loaded = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == rows.to_list()
    assert rows.column_names == [field.name for field in dataclasses.fields(Rollout)]
    assert [Rollout(**row) for row in rows.to_list()] == [item for block in BLOCKS for item in block]


def test_independent_stores_are_equal_bytes_at_another_time(tmp_path):
    write(tmp_path / "one")
    time.sleep(1.1)
    write(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 4


def test_one_token_more_is_another_fingerprint(tmp_path):
    blocks = [[rollout(0, completion_ids=[0, 1], logprobs=[-1.0, -1.0]), *BLOCKS[0][1:]], *BLOCKS[1:]]
    same, other = write(tmp_path / "one"), write(tmp_path / "two", blocks)
    assert same.fingerprint() == write(tmp_path / "three").fingerprint()
    assert same.fingerprint() != other.fingerprint()


# --- damage -----------------------------------------------------------------------------------------------------------


def test_missing_shard_is_named(tmp_path):
    store = write(tmp_path / "s")
    store.shard_path(1).unlink()
    with pytest.raises(StoreError, match=r"shard-00001\.arrow is named in the manifest and missing"):
        store.read()


def test_flipped_byte_anywhere_is_noticed(tmp_path):
    store = write(tmp_path / "s")
    size = store.shard_path(2).stat().st_size
    for position in range(0, size, size // 23):
        flip(store.shard_path(2), position)
        with pytest.raises(StoreError, match=r"shard-00002\.arrow is not the shard that was written"):
            store.read()
        flip(store.shard_path(2), position)
    assert len(store.read()) == 9


def test_cut_or_swapped_shard_is_noticed(tmp_path):
    store = write(tmp_path / "s")
    data = store.shard_path(0).read_bytes()
    for damaged in (b"", data[:-1], data + b"\0", store.shard_path(1).read_bytes()):
        store.shard_path(0).write_bytes(damaged)
        with pytest.raises(StoreError, match=r"shard-00000\.arrow"):
            store.read()


@pytest.mark.parametrize("text", ["", "{", '{"source": "student"}', "\x00"])
def test_damaged_manifest_is_a_store_error(tmp_path, text):
    store = write(tmp_path / "s")
    store.manifest_path.write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        store.read()


def test_manifest_with_an_unknown_field_is_refused(tmp_path):
    store = write(tmp_path / "s")
    values = json.loads(without_sum(store.manifest_path.read_text()))
    store.manifest_path.write_text(json.dumps(values | {"extra": 1}))
    with pytest.raises(StoreError, match="extra"):
        store.manifest()


# --- unfinished stores ------------------------------------------------------------------------------------------------


def test_store_without_manifest_is_not_complete(tmp_path):
    store = RolloutStore(tmp_path / "s")
    store.write_shard(0, BLOCKS[0], IDENTITY)
    assert not store.complete(IDENTITY)
    with pytest.raises(StoreError, match=r"manifest\.json is missing"):
        store.read()


def test_manifest_comes_after_everything_else(tmp_path, monkeypatch):
    store = write(tmp_path / "s")
    store.reopen()
    assert not store.manifest_path.exists()

    def crash(*_):
        raise KeyboardInterrupt

    store.write_shard(9, BLOCKS[0], IDENTITY)
    found = [kept(store, index) for index in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_record", crash)
        with pytest.raises(KeyboardInterrupt):
            store.finish(manifest_of(found))
    assert not store.manifest_path.exists()
    assert not store.shard_path(9).exists()
    store.finish(manifest_of(found))
    assert len(store.read()) == 9


def test_shard_that_fails_midway_leaves_nothing(tmp_path, monkeypatch):
    store = write(tmp_path / "s")
    before = contents(store.path)

    def crash(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("kdctl.run.files.os.replace", crash)
        with pytest.raises(OSError, match="disk full"):
            store.write_shard(0, BLOCKS[1], IDENTITY)
    assert contents(store.path) == before


def test_finishing_removes_unnamed_shards_and_half_written_files(tmp_path):
    write(tmp_path / "clean", BLOCKS[:2])
    store = write(tmp_path / "s")
    found = [kept(store, index) for index in range(2)]
    for name in ("shard-00002.arrow", "manifest.json"):
        left_by(dead_process(), store.path / name).write_bytes(b"half")
    store.finish(manifest_of(found))
    assert contents(store.path) == contents(tmp_path / "clean")


def test_shard_of_another_identity_is_not_kept(tmp_path):
    store = RolloutStore(tmp_path / "s")
    entry = store.write_shard(0, BLOCKS[0], IDENTITY)
    assert kept(store, 0) == entry
    assert kept(store, 0, IDENTITY[::-1]) is None
    assert kept(store, 1) is None


def test_shard_of_another_block_is_not_kept(tmp_path):
    store = write(tmp_path / "s")
    os.replace(store.shard_path(1), store.shard_path(0))
    assert kept(store, 0) is None


def test_foreign_arrow_file_is_not_kept(tmp_path):
    store = RolloutStore(tmp_path)
    table = pa.table({"prompt_id": ["x"]}).replace_schema_metadata({b"kdctl.identity": IDENTITY.encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    store.shard_path(0).write_bytes(data + hashlib.sha256(data).digest())
    assert kept(store, 0) is None


def test_damaged_shard_is_never_kept(tmp_path):
    store = RolloutStore(tmp_path / "s")
    store.write_shard(0, BLOCKS[0], IDENTITY)
    path, whole = store.shard_path(0), store.shard_path(0).read_bytes()
    for position in range(0, len(whole), 11):
        flip(path, position)
        assert kept(store, 0) is None, position
        path.write_bytes(whole)
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert kept(store, 0) is None
    path.write_bytes(whole)
    assert kept(store, 0) is not None


# --- how it is written, and what is remembered of it ------------------------------------------------------------------


def test_rows_are_the_same_bytes_in_whatever_memory_they_come(tmp_path):
    command = [sys.executable, "-c", AGAIN.format(path=str(tmp_path / "again"))]
    environment = {**os.environ, "MALLOC_PERTURB_": "165", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    here = write(tmp_path / "here", [MANY])
    assert contents(tmp_path / "again") == contents(here.path)
    assert here.kept_shard(0, IDENTITY, [(one.prompt_index, one.sample_index) for one in MANY])
    assert list(here.read()) == MANY


AGAIN = "from pathlib import Path; from tests.rollout.test_store import MANY, write; write(Path({path!r}), [MANY])"


def test_a_shard_is_never_whole_in_memory_while_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "TOGETHER", 100)
    rows = [rollout(i) for i in range(4000)]
    sizes = []
    write = streams._Hashing.write
    monkeypatch.setattr(streams._Hashing, "write", lambda self, data: sizes.append(len(data)) or write(self, data))
    store = RolloutStore(tmp_path)
    entry = store.write_shard(0, rows, IDENTITY)
    assert max(sizes) < store.shard_path(0).stat().st_size / 20
    assert list(store.read_shard(entry)) == rows


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """List the shards that are hashed."""
    names: list[str] = []
    monkeypatch.setattr(hashes, "sha256", lambda path: names.append(path.name) or sha256(path))
    return names


def test_a_store_is_hashed_once_whoever_opens_it(tmp_path, monkeypatch, hashed):
    store = write(tmp_path / "s")
    store.read()
    assert hashed == [], "what this process wrote is known"
    aged = tmp_path / "copy"
    shutil.copytree(store.path, aged)
    for path in aged.glob("*.arrow"):
        os.utime(path, (time.time() - 60, time.time() - 60))
    for _ in range(3):
        monkeypatch.setattr(hashes, "_KNOWN", {})
        assert len(RolloutStore(aged).read()) == 9
    assert len(hashed) == 3


def test_one_process_notes_what_it_wrote_for_others(tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(hashes, "SETTLED_S", 0.0)
    store = write(tmp_path / "s")
    monkeypatch.setattr(hashes, "_KNOWN", {})
    assert list(store.read()) == [item for block in BLOCKS for item in block]
    assert hashed == []
    flip(store.shard_path(1), 900)
    with pytest.raises(StoreError, match="shard-00001"):
        store.read()
    assert hashed == ["shard-00001.arrow"]


# --- stores of an older kdctl -----------------------------------------------------------------------------------------


def older(path: Path, finished: bool = True) -> RolloutStore:
    """Write a store of Parquet shards."""
    store, entries = write(path), []
    for index, (entry, block) in enumerate(zip(store.manifest().shards, BLOCKS, strict=True)):
        store.shard_path(index).unlink()
        file = store.shard_path(index).with_suffix(".parquet")
        schema = shards.SCHEMA.with_metadata({shards.IDENTITY: IDENTITY.encode()})
        table = pa.Table.from_pylist([vars(one) for one in block], schema=schema)
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        entries.append(entry.model_copy(update={"file": file.name, "sha256": sha256(file)}))
    store.reopen()
    if finished:
        store.describe(manifest_of(entries))
    return store


def test_an_older_store_reads_as_it_is(tmp_path):
    store = older(tmp_path / "s")
    before = contents(store.path)
    assert list(store.read()) == [item for block in BLOCKS for item in block]
    assert contents(store.path) == before
    flip(store.path / "shard-00001.parquet", 300)
    with pytest.raises(StoreError, match=r"shard-00001\.parquet is not the shard that was written"):
        store.read()


def test_an_older_store_that_was_interrupted_goes_on_and_is_as_if_written_now(tmp_path):
    store = older(tmp_path / "s", finished=False)
    os.truncate(store.path / "shard-00002.parquet", 300)
    assert kept(store, 0, IDENTITY[::-1]) is None
    found = [kept(store, index) for index in range(3)]
    assert found[2] is None
    store.finish(manifest_of([*found[:2], store.write_shard(2, BLOCKS[2], IDENTITY)]))
    assert contents(store.path) == contents(write(tmp_path / "new").path)


def test_store_can_be_moved(tmp_path):
    write(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert len(RolloutStore(tmp_path / "there").read()) == 9
