"""Ask of the tests whether they would notice: plant the faults of faults.toml, one at a time, and run them.

    python tests/faults.py --only holm-not-monotone     one fault, a few seconds
    python tests/faults.py --worker 0/2                 every second fault, beside --worker 1/2

Everything happens in a copy of the working tree. A fault is caught where a test fails that passes without it. The tests
of the fault's own folder go first, then all fast ones, then, with --slow, the slow ones. Exit code 1 if one was missed,
2 if the list does not fit the source.
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
    """Say of each fault whose text does not stand exactly once in its file how often it does."""
    found = []
    for fault in faults:
        path = root / fault.file
        count = path.read_text(encoding="utf-8").count(fault.old) if path.is_file() else 0
        if count != 1:
            found.append(f"{fault.name}: its text stands {count} times in {fault.file}, and must stand there once")
    return found


class Suite:
    """The tests of a copy of the source that may be changed."""

    def __init__(self, root: Path):
        self.root = root
        self.environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._sound: dict[str, bool] = {}

    def caught_by(self, fault: Fault, chosen: Sequence[str]) -> str | None:
        """Return the first of some tests that fails with a fault and passes without it, if there is one."""
        unsound: list[str] = []
        while True:
            with self._planted(fault):
                failed = self._first_failure([*chosen, *(f"--deselect={test}" for test in unsound)])
            if failed is None or failed == "timeout" or self._passes(failed):
                return failed
            if failed in unsound:
                raise RuntimeError(f"{failed} cannot be collected, with or without a fault")
            unsound.append(failed)

    def _passes(self, test: str) -> bool:
        """Tell whether a test passes alone, without a fault."""
        if test not in self._sound:
            self._sound[test] = self._first_failure([test]) is None
        return self._sound[test]

    def _first_failure(self, chosen: Sequence[str]) -> str | None:
        """Run tests until one fails and return its name; ``timeout`` if they do not end."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no"]
        command += ["--ignore=tests/test_faults.py", *chosen]  # which fails with every fault
        try:
            done = subprocess.run(
                command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=LONGEST_S
            )
        except subprocess.TimeoutExpired:
            return "timeout"
        if done.returncode in (0, 5):  # 5: none was chosen
            return None
        failed = FAILED.search(done.stdout)
        if failed is None:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return failed[1]

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
    found = [[*near, *FAST], ["tests", *FAST]] if near else [["tests", *FAST]]
    return [*found, [*near, "tests", *SLOW]] if slow else found


def missed(faults: Sequence[Fault], root: Path, slow: bool = False, tests: Sequence[str] = ()) -> list[str]:
    """Plant faults one after the other in the source at ``root``, say what catches each, return what nothing did."""
    suite, names = Suite(root), []
    for fault in faults:
        started = time.monotonic()
        tries = (suite.caught_by(fault, chosen) for chosen in stages(fault, root, slow, tests))
        test = next((test for test in tries if test is not None), None)
        names += [fault.name] if test is None else []
        result = f"MISSED  {fault.breaks}" if test is None else f"caught  {test}"
        print(f"{fault.name:30} {time.monotonic() - started:5.0f} s  {result}", flush=True)
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
