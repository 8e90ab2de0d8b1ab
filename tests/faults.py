"""Ask of the tests whether they would notice: plant the faults of faults.toml, one at a time, and run them.

    python tests/faults.py --only holm-not-monotone     one fault, a few seconds
    python tests/faults.py --worker 0/2                 every second fault, beside --worker 1/2

Everything happens in a copy of the working tree. A fault is caught where a test fails that passes without it. The tests
of the fault's own folder go first, then all fast ones, then, with --slow, the slow ones; what caught something is run
once more at the end, without a fault. Exit code 1 if a fault was missed, 2 if the list does not fit the source.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".git", ".venv", "runs", "wandb", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
LONGEST_S = 1800
FAST, SLOW = ("-m", "not slow"), ("-m", "slow")
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.MULTILINE)


class Fault(NamedTuple):
    """One change of one file. breaks: what goes wrong with it, in words."""

    name: str
    file: str
    breaks: str
    old: str
    new: str


def read_faults(path: Path = ROOT / "tests" / "faults.toml") -> list[Fault]:
    """Read the list."""
    return [Fault(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]]


def misfits(faults: Sequence[Fault], root: Path = ROOT) -> list[str]:
    """Say of each fault whose text does not stand exactly once in its file how often it does, and where else."""
    sources = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in (root / "kdctl").rglob("*.py")
    }
    found = []
    for fault in faults:
        count = sources.get(fault.file, "").count(fault.old)
        if count != 1:
            others = [name for name, text in sources.items() if fault.old in text and name != fault.file]
            found.append(
                f"{fault.name}: its text stands {count} times in {fault.file} and must stand there once; "
                f"elsewhere: {', '.join(sorted(others)) or 'nowhere'}"
            )
    return found


class Suite:
    """The tests of a copy of the source that may be changed. unsound: those that fail without a fault too."""

    def __init__(self, root: Path):
        self.root = root
        self.unsound: set[str] = set()
        self._environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    def caught_by(self, fault: Fault, stages: Sequence[Sequence[str]]) -> str | None:
        """Return the test that fails with a fault, in the first stage that has one; ``timeout`` if none ends."""
        with self._planted(fault):
            for chosen in stages:
                failed = self._failures([*chosen, "-x"])
                if failed:
                    return failed[0]
        return None

    def check(self, tests: Sequence[str]) -> set[str]:
        """Run tests without a fault, note those that fail and return them."""
        failed = set(self._failures(tests)) if tests else set[str]()
        if failed & self.unsound:
            raise RuntimeError(f"{failed & self.unsound} cannot be collected, with or without a fault")
        self.unsound |= failed
        return failed

    def _failures(self, chosen: Sequence[str]) -> list[str]:
        """Run tests and return the names of those that fail, ``timeout`` if they do not end."""
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", *chosen]
        command += ["--ignore=tests/test_faults.py"]  # which fails with every fault
        command += [f"--deselect={test}" for test in self.unsound]
        try:
            done = subprocess.run(
                command, cwd=self.root, env=self._environment, capture_output=True, text=True, timeout=LONGEST_S
            )
        except subprocess.TimeoutExpired:
            return ["timeout"]
        failed: list[str] = FAILED.findall(done.stdout)
        if done.returncode not in (0, 5) and not failed:  # 5: none was chosen
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return failed

    @contextmanager
    def _planted(self, fault: Fault) -> Iterator[None]:
        """Hold a fault in the source."""
        path = self.root / fault.file
        before = path.read_text(encoding="utf-8")
        _rewrite(path, before.replace(fault.old, fault.new))
        try:
            yield
        finally:
            _rewrite(path, before)


def _rewrite(path: Path, text: str) -> None:
    """Change a source file. Its bytecode goes: Python would keep it after a change of equal length in one second."""
    path.write_text(text, encoding="utf-8")
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)


def stages(fault: Fault, root: Path, slow: bool, tests: Sequence[str]) -> list[list[str]]:
    """List what to run one after the other until a fault is caught: near tests first."""
    if tests:
        return [list(tests)]
    inside = Path(fault.file).relative_to("kdctl")
    folder = Path("tests") / inside.parent
    near = [str(path) for path in (folder / f"test_{inside.name}", folder) if (root / path).exists()]
    places = [near, ["tests"]] if near else [["tests"]]
    return [[*place, *speed] for speed in ((FAST, SLOW) if slow else (FAST,)) for place in places]


def missed(faults: Sequence[Fault], root: Path, slow: bool = False, tests: Sequence[str] = ()) -> list[str]:
    """Plant faults one after the other in the source at ``root``, say what catches each, return what nothing did."""
    suite, caught = Suite(root), dict[Fault, str | None]()
    waiting = list(faults)
    while waiting:
        for fault in waiting:
            started = time.monotonic()
            caught[fault] = suite.caught_by(fault, stages(fault, root, slow, tests))
            result = f"caught  {caught[fault]}" if caught[fault] else f"MISSED  {fault.breaks}"
            print(f"{fault.name:30} {time.monotonic() - started:5.0f} s  {result}", flush=True)
        unsound = suite.check(sorted({test for test in caught.values() if test and test != "timeout"}))
        print("".join(f"{test} fails without a fault too\n" for test in sorted(unsound)), end="")
        waiting = [fault for fault in faults if caught[fault] in unsound]
    names = [fault.name for fault in faults if caught[fault] is None]
    print(f"{len(faults) - len(names)} of {len(faults)} faults caught")
    return names


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Plant faults in a copy of kdctl and see which the tests catch.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plant these faults")
    parser.add_argument("--tests", help="run these tests (and pytest options) and no others")
    parser.add_argument("--slow", action="store_true", help="run the slow tests too where no fast one catches a fault")
    parser.add_argument("--list", action="store_true", help="list the faults")
    parser.add_argument("--worker", default="0/1", metavar="K/N", help="plant every N-th fault, from the K-th on")
    asked = parser.parse_args()
    faults = read_faults()
    unknown = set(asked.only or ()) - {fault.name for fault in faults}
    wrong = [*(f"{name}: no such fault" for name in sorted(unknown)), *misfits(faults)]
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    if asked.list:
        print("\n".join(f"{fault.name:30} {fault.file:30} {fault.breaks}" for fault in faults))
        return 0
    first, step = map(int, asked.worker.split("/"))
    chosen = [fault for fault in faults if fault.name in (asked.only or [fault.name])][first::step]
    with tempfile.TemporaryDirectory(prefix="kdctl-faults-") as folder:
        copy = Path(folder) / "kdctl"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        return int(bool(missed(chosen, copy, asked.slow, (asked.tests or "").split())))


if __name__ == "__main__":
    sys.exit(main())
