"""Names in a run folder, and the room that there is for them."""

import os
from collections import namedtuple
from pathlib import Path

import pytest

from kdctl.base.errors import StoreError
from kdctl.run import files, paths
from kdctl.run.files import write_text
from kdctl.run.paths import RunDir, require_free_space

Usage = namedtuple("Usage", "total used free")


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

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(StoreError, match="Permission denied"):
        RunDir(tmp_path).prepare()


def test_only_finished_variants_are_listed_by_name(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.variants() == []
    for name in ("b", "a"):
        write_text(run.variant(name).report, "{}")
    run.variant("unfinished").checkpoints.mkdir(parents=True)
    assert [variant.name for variant in run.variants()] == ["a", "b"]


@pytest.mark.parametrize(("free", "said"), [(0, "0 KiB"), (3 * 2**20, "3,072 KiB"), (2**30 - 1, "1.00 GiB")])
def test_too_little_space_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, said: str
) -> None:
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - free, free))
    with pytest.raises(StoreError, match=rf"training needs 1\.00 GiB .* {said} free"):
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
