"""Remembered hashes: each file is read once, and a file that changed is read again."""

import os
import shutil
import time
from pathlib import Path

import pytest

from kdctl.base.errors import StoreError
from kdctl.formats.student import check_sums, write_sums
from kdctl.model.folder import fingerprint
from kdctl.run import hashes
from kdctl.run.files import sha256

HOUR = 3600


@pytest.fixture
def folder(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a model whose files are an hour old; nothing is remembered of them."""
    shutil.copytree(tiny_dir, tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        os.utime(path, (time.time() - HOUR, time.time() - HOUR))
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_KNOWN", {})
    return tmp_path / "model"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the files that are hashed."""
    names: list[str] = []
    monkeypatch.setattr(hashes, "sha256", lambda path: names.append(path.name) or sha256(path))
    return names


def test_a_model_is_read_once_and_by_a_later_process_not_at_all(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprint(folder)
    assert read.count("model.safetensors") == 1
    assert fingerprint(folder) == first
    monkeypatch.setattr(hashes, "_KNOWN", {})
    assert fingerprint(folder) == first
    assert read.count("model.safetensors") == 1


def test_a_changed_file_of_the_same_size_is_read_again(folder: Path, read: list[str]) -> None:
    first, weights = fingerprint(folder), folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(folder) != first
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(folder) == first
    assert read.count("model.safetensors") == 3, "what has just changed is not remembered"


def test_integrity_is_never_taken_from_another_process(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sums(folder)
    for _ in range(2):  # the first notes what the second takes
        monkeypatch.setattr(hashes, "_KNOWN", {})
        fingerprint(folder)
    assert read.count("model.safetensors") == 2
    check_sums(folder)
    fingerprint(folder)
    check_sums(folder)
    assert read.count("model.safetensors") == 3


def test_what_was_just_written_is_known_where_it_is_moved_to_until_it_changes(
    folder: Path, read: list[str], tmp_path: Path
) -> None:
    write_sums(folder)
    moved = folder.rename(tmp_path / "moved")
    check_sums(moved)
    fingerprint(moved)
    assert read.count("model.safetensors") == 1
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(StoreError, match="does not match"):
        check_sums(moved)


def test_a_damaged_note_and_a_cache_that_cannot_be_written_cost_time_only(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = fingerprint(folder)
    for note in (tmp_path / "cache" / "hashes").iterdir():
        note.write_text("{")
    monkeypatch.setattr(hashes, "_KNOWN", {})
    assert fingerprint(folder) == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(hashes, "_KNOWN", {})
    assert fingerprint(folder) == first
    assert read.count("model.safetensors") == 3


def test_a_file_that_is_edited_in_place_and_dated_back_is_read_again(folder: Path, read: list[str]) -> None:
    first, weights = fingerprint(folder), folder / "model.safetensors"
    before = weights.stat()
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert fingerprint(folder) != first
    assert read.count("model.safetensors") == 2


def test_many_files_of_a_folder_are_read_once_and_have_one_note(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = sorted(path.name for path in folder.iterdir())
    expected = [sha256(folder / name) for name in names]
    for _ in range(2):
        monkeypatch.setattr(hashes, "_KNOWN", {})
        assert hashes.known_files(folder, names) == expected
    assert hashes.known_files(folder, names[:2]) == expected[:2]
    assert sorted(read) == names
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) == 1
    changed = folder / names[0]
    changed.write_bytes(changed.read_bytes()[::-1])
    monkeypatch.setattr(hashes, "_KNOWN", {})
    assert hashes.known_files(folder, names) == [sha256(changed), *expected[1:]]
    assert sorted(read) == sorted([*names, names[0]])


def test_what_is_measured_of_files_is_kept_apart_from_their_hashes(folder: Path, read: list[str]) -> None:
    def size(path: Path) -> str:
        return str(path.stat().st_size)

    names = sorted(path.name for path in folder.iterdir())
    hashed = hashes.known_files(folder, names)
    for _ in range(2):
        assert hashes.known_files(folder, names, size) == [size(folder / name) for name in names]
        assert hashes.known_files(folder, names) == hashed
    assert sorted(read) == names


def test_what_was_written_is_noted_and_what_was_not_is_not(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = "config.json", "model.safetensors"
    hashes.remember(folder / mine, sha256(folder / mine))
    hashes.note_known(folder, [mine, others])
    monkeypatch.setattr(hashes, "_KNOWN", {})
    hashes.known_files(folder, [mine, others])
    assert read == [others]
