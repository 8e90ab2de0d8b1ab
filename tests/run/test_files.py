"""Files appear whole or not at all, and every failure names its file."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from safetensors import SafetensorError

from kdctl.run import files
from kdctl.run.files import (
    append,
    atomic_folder,
    atomic_path,
    remove,
    replace_folder,
    sha256,
    sweep_up,
    write_bytes,
    write_text,
    writing,
)
from tests.leftovers import dead_process, left_by


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


def test_only_what_dead_processes_of_this_host_left_is_swept_up(tmp_path: Path) -> None:
    dead, alive = dead_process(), os.getppid()
    write_text(left_by(dead, tmp_path / "deep" / "student") / "stale", "from a killed run")
    write_text(left_by(dead, tmp_path / "file"), "half")
    write_text(left_by(alive, tmp_path / "file"), "being written")
    write_text(tmp_path / f".file.elsewhere-{dead}.tmp", "being written on another host")
    kept = {left_by(alive, tmp_path / "file").name, f".file.elsewhere-{dead}.tmp"}
    sweep_up(tmp_path)
    assert set(everything(tmp_path)) == kept


def test_a_later_process_of_the_same_number_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = left_by(os.getppid(), tmp_path / "file")
    write_text(left, "half")
    monkeypatch.setattr("psutil.Process.create_time", lambda _: left.stat().st_ctime + 10)
    sweep_up(tmp_path)
    assert not everything(tmp_path)


def test_writing_a_file_or_a_folder_again_clears_away_what_dead_processes_left_of_it(tmp_path: Path) -> None:
    dead = dead_process()
    for name in ("note.json", "folder", "note"):
        write_text(left_by(dead, tmp_path / name), "half")
    write_text(tmp_path / "note.json", "whole")
    with atomic_folder(tmp_path / "folder") as temporary:
        write_text(temporary / "file", "whole")
    assert set(everything(tmp_path)) == {"note.json", "folder/file", left_by(dead, tmp_path / "note").name}


@pytest.mark.parametrize("new", [False, True])
def test_a_folder_that_a_killed_process_had_moved_goes_back_unless_another_took_its_place(
    tmp_path: Path, new: bool
) -> None:
    write_text(left_by(dead_process(), tmp_path / "student", "old") / "weights", "old")
    if new:
        write_text(tmp_path / "student" / "weights", "new")
    sweep_up(tmp_path)
    assert everything(tmp_path) == {"student/weights": "new" if new else "old"}


def failing(operation: str, number: int) -> Callable[[str, Path], None]:
    """Return a disk on which an operation fails."""

    def before(found: str, path: Path) -> None:
        if found == operation:
            raise OSError(number, os.strerror(number), str(path))

    return before


@pytest.mark.parametrize("operation", ["write", "sync", "rename", "mkdir"])
def test_a_disk_that_fails_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    write_text(tmp_path / "student" / "weights", "old")
    monkeypatch.setattr(files, "before", failing(operation, errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"), atomic_folder(tmp_path / "student") as temporary:
        write_text(temporary / "weights", "new")
    assert everything(tmp_path) == {"student/weights": "old"}


def test_a_folder_whose_second_rename_fails_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "new" / "a", "new")
    write_text(tmp_path / "place" / "b", "old")

    def before(operation: str, path: Path) -> None:
        if operation == "rename" and path.name == "place":
            raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(files, "before", before)
    with pytest.raises(OSError, match="Input/output"):
        replace_folder(tmp_path / "new", tmp_path / "place")
    assert everything(tmp_path) == {"new/a": "new", "place/b": "old"}


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError("262144 requested and 12345 written"), errno.EIO),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), errno.EFBIG),
        (Exception("No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), errno.EIO),
        (pa.ArrowInvalid("cannot write"), errno.EIO),
    ],
)
def test_whatever_a_library_says_of_a_failed_disk_has_a_number_and_the_path(
    tmp_path: Path, raised: Exception, number: int
) -> None:
    with pytest.raises(OSError) as caught, writing(tmp_path / "file"):  # noqa: PT011 - looked at below
        raise raised
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "file"))


def test_errors_that_are_not_of_the_disk_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writing(tmp_path / "file"):
        raise KeyError("bug")


def test_what_could_not_be_appended_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path / "lines", b"one\n")
    monkeypatch.setattr(files, "before", failing("sync", errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        append(tmp_path / "lines", b"two\n")
    assert (tmp_path / "lines").read_text() == "one\n"


@pytest.mark.parametrize("folder", [False, True])
def test_remove_leaves_nothing_and_takes_what_is_missing(tmp_path: Path, folder: bool) -> None:
    place = tmp_path / "store"
    write_text(place / "shard" if folder else place, "x")
    remove(place)
    remove(place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [False, True])
def test_replace_folder_moves_the_new_one_in(tmp_path: Path, old: bool) -> None:
    write_text(tmp_path / "new" / "a", "new")
    if old:
        write_text(tmp_path / "place" / "b", "old")
    replace_folder(tmp_path / "new", tmp_path / "place")
    assert everything(tmp_path) == {"place/a": "new"}


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("operation", ["write", "sync", "rename", "mkdir"])
def test_a_disk_that_fails_names_the_file_and_not_its_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr(files, "before", failing(operation, errno.EIO))
    with pytest.raises(OSError, match="Input/output") as single:
        write_text(tmp_path / "new" / "preset.json", "text")
    with pytest.raises(OSError, match="Input/output") as inner, atomic_folder(tmp_path / "student") as temporary:
        write_text(temporary / "weights", "new")
    assert single.value.filename in (str(tmp_path / "new"), str(tmp_path / "new" / "preset.json"))
    assert inner.value.filename in (str(tmp_path / "student"), str(tmp_path / "student" / "weights"))


def test_a_sync_that_fails_names_the_file_and_not_its_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        write_text(tmp_path / "preset.json", "text")
    assert caught.value.filename == str(tmp_path / "preset.json")


def test_a_rename_that_fails_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_text(tmp_path / "report.html", "text")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "report.html"), None)
