"""A name in a file leads nowhere but into that file's folder, wherever names are read."""

from pathlib import Path

import pytest

from kdctl.base.errors import StoreError
from kdctl.formats.student import check_sums
from kdctl.rollout.store import RolloutStore
from kdctl.run.names import inside
from kdctl.run.paths import RunDir
from kdctl.run.records import Rollout, StoreManifest

ELSEWHERE = ["../x", "a/../../x", "/etc/passwd", "", ".", "..", "a\0b", "a\nb", "..\\x"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_that_lead_elsewhere_are_refused_and_others_are_not(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="leads elsewhere"):
        inside(tmp_path, name)
    assert inside(tmp_path, "λ=0.5/b.json") == tmp_path / "λ=0.5" / "b.json"


@pytest.mark.parametrize("name", ["../x", "/x"])
def test_a_run_folder_names_nothing_outside(tmp_path: Path, name: str) -> None:
    run = RunDir(tmp_path)
    for named in (run.rollouts, run.variant, run.eval, run.compared, lambda task: run.samples("ptq", task)):
        with pytest.raises(StoreError):
            named(name)


def test_a_manifest_cannot_name_a_shard_elsewhere(tmp_path: Path) -> None:
    rollout = Rollout("p", 0, 0, [1], [2], [-0.5], "stop", 0, 1, "teacher")
    other, store = RolloutStore(tmp_path / "other"), RolloutStore(tmp_path / "store")
    entry = other.write_shard(0, [rollout], "id")
    made = {"source": "teacher", "identity": "id", "writer": "w", "sampling": None}
    store.describe(StoreManifest(**made, shards=(entry.model_copy(update={"file": "../other/shard-00000.arrow"}),)))
    with pytest.raises(StoreError, match=r"\.\./other/shard-00000"):
        store.read()
    with pytest.raises(StoreError, match="leads elsewhere"):
        store.read_shard(entry.model_copy(update={"file": str(tmp_path / "other" / "shard-00000.arrow")}))


def test_sums_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "SHA256SUMS").write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(StoreError, match=r"\.\./secret"):
        check_sums(tmp_path / "student")


def test_a_name_that_is_no_text_is_not_said_to_lead_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not UTF-8, or the locale is another"):
        inside(tmp_path, "\udcc3\udca9")
