"""The guard on processor time fails a run, names the test, and counts neither slow tests nor what tests share."""

import subprocess
import sys
from pathlib import Path

import budget
import pytest

TESTS = """
import time
import pytest

def burn(seconds=0.15):
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass

@pytest.fixture(scope="module")
def shared():
    burn()

@pytest.fixture
def own():
    burn()

def test_quick(): pass
def test_waits(): time.sleep(0.15)
@pytest.mark.slow
def test_slow(): burn()
def test_with_a_shared_fixture(shared): pass
"""
TOO_LONG = """
def test_long(): burn()
def test_with_its_own_fixture(own): pass
def test_with_a_child():
    import subprocess, sys
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.15: pass"], check=True)
"""


def run(folder: Path, tests: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (folder / "test_made_up.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "budget", "-p", "xdist", "--processor-limit=0.1"]
    environment = {"PYTHONPATH": str(Path(budget.__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [*command, *options, str(folder)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_slow_tests_waiting_and_shared_fixtures_may_take_longer(tmp_path: Path) -> None:
    done = run(tmp_path, TESTS)
    assert done.returncode == 0, done.stdout
    assert "of processor time" not in done.stdout


def test_a_run_fails_where_a_fast_test_takes_longer(tmp_path: Path) -> None:
    done = run(tmp_path, TESTS + TOO_LONG, "-n1")
    assert done.returncode == 1
    named = {line.split("::")[1].split()[0] for line in done.stdout.splitlines() if "of processor time" in line}
    assert named == {"test_long", "test_with_its_own_fixture", "test_with_a_child"}


def test_a_slow_machine_is_given_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "slowness", lambda: 2.0)
    found = budget.Budget(shown=0, given_s=None)
    found.seconds, found.fast = {"long": 5.9, "longer": 6.1, "slow": 9.0}, {"long", "longer"}
    found.judge()
    assert found.over == ["longer"]
