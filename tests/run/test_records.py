"""Records: closed, frozen, and equal after a trip through JSON."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from kdctl.run.record_files import read_record, write_record
from kdctl.run.records import Estimate, SamplingRecord, ShardEntry, StoreManifest

SAMPLING = SamplingRecord(temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=8, seed=3)


def manifest(**fields) -> StoreManifest:
    shards = tuple(
        ShardEntry(file=f"shard-{i:05d}.arrow", rows=i + 1, completion_tokens=10 * (i + 1), sha256=f"{i}" * 64)
        for i in range(3)
    )
    values = {"source": "student", "identity": "a" * 16, "writer": "w", "sampling": SAMPLING, "shards": shards}
    return StoreManifest.model_validate(values | fields)


def test_a_manifest_counts_rows_and_tokens_over_its_shards() -> None:
    assert manifest().rows == 6
    assert manifest().completion_tokens == 60
    assert manifest(shards=()).rows == manifest(shards=()).completion_tokens == 0


@pytest.mark.parametrize("fields", [{}, {"sampling": None}, {"steps": {"0-1": (0, 4), "2-3": (4, 9)}}])
def test_a_manifest_reads_back_equal(tmp_path: Path, fields: dict) -> None:
    record = manifest(**fields)
    write_record(tmp_path / "manifest.json", record)
    assert read_record(tmp_path / "manifest.json", StoreManifest) == record


def test_equal_manifests_leave_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_record(tmp_path / name, manifest(steps={"0-1": (0, 4)}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_figures_that_are_not_finite_read_back_equal(tmp_path: Path) -> None:
    record = Estimate(value=float("inf"), low=float("-inf"), high=1e308)
    write_record(tmp_path / "e.json", record)
    assert read_record(tmp_path / "e.json", Estimate) == record


def test_records_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        manifest().source = "teacher"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="Extra inputs"):
        manifest(note="x")
