"""A store read by the row is the list that was written, and only the rows in use are in memory."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from budget import slowness

from kdctl.base.errors import StoreError
from kdctl.base.sums import without_sum
from kdctl.rollout import mapped
from kdctl.rollout.store import RolloutStore
from kdctl.run.records import Rollout, StoreManifest

SCALE = Path(__file__).parents[2] / "benchmarks" / "scale.py"


def rollout(index: int) -> Rollout:
    tokens = [index, *range(index % 7)]
    logprobs = None if index % 3 else [-0.5 * token for token in tokens]
    return Rollout(f"p{index}", index, 0, [*range(index % 4)], tokens, logprobs, "length", 0, 2**40, "teacher")


ROWS = [rollout(i) for i in range(40)]


def written(folder: Path, rows: list[Rollout] = ROWS, size: int = 9) -> RolloutStore:
    store = RolloutStore(folder)
    parts = enumerate(rows[i : i + size] for i in range(0, len(rows), size))
    shards = tuple(store.write_shard(index, part, "id") for index, part in parts)
    store.finish(StoreManifest(source="teacher", identity="id", writer="w", sampling=None, shards=shards))
    return store


def test_rows_and_slices_are_those_of_a_list(tmp_path):
    found = written(tmp_path).read()
    assert len(found) == 40
    for index in (0, 8, 9, 26, 39, -1, -40):
        assert found[index] == ROWS[index]
    for part in (slice(None), slice(5, 31), slice(None, None, -1), slice(3, 38, 7), slice(20, 20), slice(-3, None)):
        assert list(found[part]) == ROWS[part], part
        assert len(found[part]) == len(ROWS[part])
    assert list(found[4:30][2::3]) == ROWS[4:30][2::3]
    assert found[10:][3] == ROWS[13]
    for index in (40, -41):
        with pytest.raises(IndexError):
            found[index]
    assert ROWS[12] in found
    assert found.index(ROWS[12]) == 12


def test_a_column_of_integers_is_that_of_the_rows_and_no_row_is_decoded(tmp_path, monkeypatch):
    found = written(tmp_path).read()
    monkeypatch.setattr(mapped, "value_of", lambda scalar: pytest.fail("a row was decoded"))
    for part in (slice(None), slice(5, 31), slice(None, None, -1), slice(20, 20)):
        assert mapped.numbers(found[part], "prompt_index").tolist() == [row.prompt_index for row in ROWS[part]]
    assert mapped.numbers(ROWS, "prompt_index").tolist() == [*range(40)]
    assert mapped.numbers([], "prompt_index").tolist() == []


def test_one_shard_is_read_by_the_row_too(tmp_path):
    store = written(tmp_path)
    assert list(store.read_shard(store.manifest().shards[1])) == ROWS[9:18]


def test_shards_are_untouched_until_a_row_is_asked_for(tmp_path):
    store = written(tmp_path)
    found = store.read()
    store.shard_path(3).unlink()
    assert list(found[:27]) == ROWS[:27]
    with pytest.raises(StoreError, match=r"shard-00003\.arrow is not the shard that was written"):
        found[27]


@pytest.mark.parametrize(
    "touch", [lambda path: path.chmod(0o600), os.utime, lambda path: os.link(path, f"{path}.copy")]
)
def test_shard_that_was_only_touched_after_opening_is_read(tmp_path, touch):
    store = written(tmp_path)
    found = store.read()
    touch(store.shard_path(1))
    assert list(found) == ROWS


def test_shard_that_was_changed_after_opening_is_refused(tmp_path):
    store, other = written(tmp_path / "s"), written(tmp_path / "other", ROWS[::-1])
    found = store.read()
    assert found[0] == ROWS[0]
    os.replace(other.shard_path(2), store.shard_path(2))
    os.replace(other.shard_path(0), store.shard_path(0))
    with pytest.raises(StoreError, match=r"shard-00002\.arrow is not the shard that was written"):
        found[20]
    assert found[1] == ROWS[1], "a shard that is mapped is the file that it was"


def test_no_list_of_rows_is_held(tmp_path):
    found = written(tmp_path).read()
    alive = []
    for place, _ in enumerate(found):
        if place % 13 == 0:
            alive.append(sum(isinstance(thing, Rollout) for thing in gc.get_objects()) - len(ROWS))
    assert max(alive) <= 2


def maps(folder: Path) -> int:
    """Count the shards of a folder that this process has mapped."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if str(folder) in line})


def test_more_shards_than_maps_are_read_in_any_order_and_few_are_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MAPPED", 2)
    found = written(tmp_path, size=4).read()
    for place in [(17 * i) % 40 for i in range(80)]:
        assert found[place] == ROWS[place]
        assert maps(tmp_path) <= 2


def file_pages() -> int:
    """Return the kilobytes of files that count as memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


def test_pages_that_were_read_do_not_stay_memory_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "LET_GO", 4)
    rows = [dataclasses.replace(rollout(i), completion_ids=[i] * 20_000, logprobs=None) for i in range(400)]
    found = written(tmp_path, rows, 100).read()
    before, most = file_pages(), 0
    for place in [(17 * i) % 400 for i in range(800)]:
        assert found[place].completion_ids == rows[place].completion_ids
        most = max(most, file_pages() - before)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.arrow")) > 32_000_000
    assert most < 12_000
    assert len(found.shards._tables) == 4, "they are mapped all the same"


def test_rows_lie_in_the_file_and_not_in_memory_or_open_files(tmp_path):
    found = written(tmp_path, [rollout(i % 40) for i in range(3000)], 1500).read()
    handles, allocated = len(os.listdir("/proc/self/fd")), pa.total_allocated_bytes()
    assert [found[place].prompt_index for place in (2999, 0)] == [39, 0]
    assert found.shards.table(0).nbytes > 100_000
    assert pa.total_allocated_bytes() - allocated < 1000
    assert len(os.listdir("/proc/self/fd")) == handles
    assert maps(tmp_path) == 2


@pytest.mark.slow
@pytest.mark.skipif(not SCALE.exists(), reason="needs benchmarks/, which the source distribution leaves out")
def test_a_million_rollouts_open_at_once_and_are_drawn_within_a_gigabyte(tmp_path):
    command = [sys.executable, str(SCALE), "--rows", "1000000", "--batches", "20", "--folder", str(tmp_path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    head, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    found = dict(zip(head, row, strict=True))
    assert found["rows"] == "1,000,000"
    assert float(found["open s"]) < 0.2 * slowness()
    assert float(found["RSS MB"]) < 1000


def test_a_manifest_that_counts_other_rows_than_a_shard_has_is_refused(tmp_path):
    for rows in (3, 99):
        store = written(tmp_path / str(rows))
        manifest = json.loads(without_sum(store.manifest_path.read_text()))
        manifest["shards"][0]["rows"] = rows
        store.manifest_path.write_text(json.dumps(manifest))
        with pytest.raises(StoreError, match="shard-00000"):
            list(store.read())
