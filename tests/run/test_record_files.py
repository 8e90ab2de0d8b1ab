"""Records on disk: checked when they are read."""

import json
from pathlib import Path

import pytest

from kdctl.base.errors import StoreError
from kdctl.run.record_files import read_record, remedy, write_record
from kdctl.run.records import Estimate


def test_a_missing_record_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone\.json is missing"):
        read_record(tmp_path / "gone.json", Estimate)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"value": 1}', b'{"value": 1, "low": 0, "high": 2, "more": 3}'],
)
def test_a_damaged_record_is_refused_by_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"record\.json is damaged or of another kdctl version"):
        read_record(path, Estimate)


def test_a_record_reads_back_equal_and_ends_in_a_newline(tmp_path: Path) -> None:
    record = Estimate(value=1 / 3, low=0.0, high=1e9)
    write_record(tmp_path / "r.json", record)
    assert read_record(tmp_path / "r.json", Estimate) == record
    assert (tmp_path / "r.json").read_text().endswith("}\n")


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_every_flipped_bit_of_a_record_is_noticed(tmp_path: Path, place: int) -> None:
    path = tmp_path / "run" / "student" / "quantize.json"
    write_record(path, Estimate(value=1.25, low=0.5, high=2.0))
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << place % 7
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"quantize\.json is damaged.*kdctl quantize --run .*/run --force"):
        read_record(path, Estimate)


def test_a_record_written_without_a_hash_still_opens(tmp_path: Path) -> None:
    record = Estimate(value=1.25, low=0.5, high=2.0)
    (tmp_path / "r.json").write_text(record.model_dump_json(indent=2) + "\n")
    assert read_record(tmp_path / "r.json", Estimate) == record


def test_an_edited_record_is_noticed_however_it_is_laid_out(tmp_path: Path) -> None:
    write_record(tmp_path / "r.json", Estimate(value=1.25, low=0.5, high=2.0))
    (tmp_path / "r.json").write_text(json.dumps(json.loads((tmp_path / "r.json").read_text()) | {"value": 1.5}))
    with pytest.raises(StoreError, match="not the one that was written"):
        read_record(tmp_path / "r.json", Estimate)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("r/rollouts/student/manifest.json", "kdctl rollout --run r --source student --force"),
        ("r/rollouts/heldout/manifest.json", "remove r/rollouts/heldout"),
        ("r/distill/v/distill.json", "kdctl distill --run r --name v --force"),
        ("r/distill/v/checkpoints/step_000002/meta.json", "remove r/distill/v/checkpoints/step_000002 "),
        ("r/eval/ptq/results.json", "kdctl eval ptq --run r --force"),
        ("r/compare/hqq.json", "kdctl quantize --run r --compare hqq --force"),
    ],
)
def test_the_remedy_names_the_stage(path: str, words: str) -> None:
    assert words in remedy(Path(path))
