"""The faults of faults.toml can be planted: every one is still a change of the source."""

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(Path(__file__).with_name("faults.py")))
FAULTS = SCRIPT["read_faults"]()


def test_every_fault_stands_once_in_the_source() -> None:
    assert SCRIPT["misfits"](FAULTS) == []


def test_a_text_that_is_gone_or_has_moved_is_named() -> None:
    gone, moved = FAULTS[0]._replace(old="no such text"), FAULTS[0]._replace(file="kdctl/moved.py")
    lines = SCRIPT["misfits"]([gone, moved])
    assert [line.rpartition(": ")[2] for line in lines] == ["nowhere", FAULTS[0].file]
    assert all("stands 0 times" in line for line in lines)


def test_every_folder_has_a_fault() -> None:
    folders = {path.parent.name for path in (ROOT / "kdctl").glob("*/__init__.py")}
    assert {Path(fault.file).parts[1] for fault in FAULTS} == folders
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_another_program(fault) -> None:
    before = (ROOT / fault.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(before)) != ast.dump(ast.parse(before.replace(fault.old, fault.new)))


@pytest.mark.slow
def test_a_planted_fault_is_caught_and_taken_out_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "ONE = 1\nTWO = 2\n"
    files = {
        "kdctl/__init__.py": "",
        "kdctl/base/__init__.py": "",
        "kdctl/base/one.py": source,
        "tests/base/test_one.py": "from kdctl.base.one import ONE\n\ndef test_one():\n    assert ONE == 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    fault = SCRIPT["Fault"]("first", "kdctl/base/one.py", "numbers", "ONE = 1", "ONE = 2")
    other = fault._replace(name="second", old="TWO = 2", new="TWO = 3")
    assert SCRIPT["missed"]([fault, other], tmp_path) == ["second"]
    assert (tmp_path / "kdctl/base/one.py").read_text() == source
    assert "caught  tests/base/test_one.py::test_one" in capsys.readouterr().out
