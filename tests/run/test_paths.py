"""Files of a run appear whole or not at all."""

import os
from collections import namedtuple
from pathlib import Path

import pytest

from kdctl.base.errors import StoreError
from kdctl.run import paths
from kdctl.run.paths import (
    RunDir,
    atomic_folder,
    atomic_path,
    read_record,
    replace_folder,
    require_free_space,
    sha256,
    write_bytes,
    write_record,
    write_text,
)
from kdctl.run.records import Estimate

Usage = namedtuple("Usage", "total used free")


def everything(folder: Path) -> dict[str, str]:
    """Return the text of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_half(path: Path, error: type[BaseException]) -> None:
    """Begin to write a file and fail."""
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def write_half_folder(folder: Path) -> None:
    """Begin to write a folder and fail."""
    with atomic_folder(folder) as temporary:
        write_text(temporary / "weights", "half")
        raise RuntimeError


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_file_leaves_what_was_there(tmp_path: Path, old: str | None, error: type[BaseException]) -> None:
    path = tmp_path / "file.json"
    if old is not None:
        path.write_text(old)
    before = everything(tmp_path)
    with pytest.raises(error):
        write_half(path, error)
    assert everything(tmp_path) == before


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(("sync", os.fstat(handle).st_ino))
        sync(handle)

    def replaced(source: Path, target: Path) -> None:
        done.append(("replace", source.stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_bytes(tmp_path / "file", b"content")
    file, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert done == [("sync", file), ("replace", file), ("sync", folder)]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert everything(tmp_path) == {"file": "new"}


def test_writing_makes_parents_and_leaves_one_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "text", "λ = ½\n")
    write_bytes(tmp_path / "a" / "bytes", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "λ = ½\n".encode()
    assert (tmp_path / "a" / "bytes").read_bytes() == b"\x00\xff"
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize("old", [False, True])
def test_an_interrupted_folder_leaves_what_was_there(tmp_path: Path, old: bool) -> None:
    folder = tmp_path / "student"
    if old:
        write_text(folder / "weights", "old")
    before = everything(tmp_path)
    with pytest.raises(RuntimeError):
        write_half_folder(folder)
    assert everything(tmp_path) == before
    assert folder.exists() == old
    assert [path.name for path in tmp_path.iterdir()] == (["student"] if old else [])


def test_a_finished_folder_takes_the_place_of_the_old_one_entirely(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "student"
    write_text(folder / "old-only", "old")
    with atomic_folder(folder) as temporary:
        write_text(temporary / "sub" / "weights", "new")
        assert everything(folder) == {"old-only": "old"}
    assert everything(tmp_path) == {"deep/student/sub/weights": "new"}
    assert [path.name for path in folder.parent.iterdir()] == ["student"]


def test_what_a_killed_run_left_half_written_does_not_get_in(tmp_path: Path) -> None:
    write_text(tmp_path / ".student.tmp" / "stale", "from a killed run")
    write_text(tmp_path / ".student.old" / "stale", "from a killed run")
    with atomic_folder(tmp_path / "student") as temporary:
        write_text(temporary / "weights", "new")
    assert everything(tmp_path) == {"student/weights": "new"}


@pytest.mark.parametrize("old", [False, True])
def test_replace_folder_moves_the_new_one_in(tmp_path: Path, old: bool) -> None:
    write_text(tmp_path / "new" / "a", "new")
    if old:
        write_text(tmp_path / "place" / "b", "old")
    replace_folder(tmp_path / "new", tmp_path / "place")
    assert everything(tmp_path) == {"place/a": "new"}


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


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_naming_creates_nothing_and_prepare_only_the_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a" / "run")
    for path in (run.student, run.rollouts("teacher"), run.eval("ptq"), run.variant("v").final, run.heldout):
        assert run.path in path.parents
    assert list(tmp_path.iterdir()) == []
    run.prepare()
    run.prepare()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert run.path.is_dir()


@pytest.mark.parametrize("inner", ["file/run", "file/deep/run", "file"])
def test_a_folder_that_cannot_be_is_refused_with_the_way_out(tmp_path: Path, inner: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot write to the run folder.*--run"):
        RunDir(tmp_path / inner).prepare()
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(paths.tempfile, "TemporaryFile", refuse)
    with pytest.raises(StoreError, match="Permission denied"):
        RunDir(tmp_path).prepare()


def test_only_finished_variants_are_listed_by_name(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.variants() == []
    for name in ("b", "a"):
        write_text(run.variant(name).report, "{}")
    run.variant("unfinished").checkpoints.mkdir(parents=True)
    assert [variant.name for variant in run.variants()] == ["a", "b"]


@pytest.mark.parametrize("free", [0, 2**30 - 1])
def test_too_little_space_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - free, free))
    with pytest.raises(StoreError, match=rf"training needs 1\.00 GiB .* {free / 2**30:.2f} GiB free"):
        require_free_space(tmp_path, 2**30, "training")


def test_space_is_measured_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(10, 5, 5)

    monkeypatch.setattr(paths.shutil, "disk_usage", usage)
    require_free_space(tmp_path / "not" / "yet" / "there", 5, "training")
    monkeypatch.chdir(tmp_path)
    require_free_space(Path("not/yet/there"), 5, "training")
    assert [os.path.realpath(path) for path in asked] == [os.path.realpath(tmp_path)] * 2
