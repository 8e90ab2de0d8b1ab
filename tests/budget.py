"""A plugin of pytest: the processor time of every test, and a run that fails where a fast one takes too long.

Counted are the test, its own fixtures and the processes it waited for; not what a module or a session shares. The limit
is for a machine that imports torch in a second; where that takes longer, so may a test.
"""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator
from pathlib import PurePosixPath
from typing import Any

import pytest

LIMIT_S = 3.0
KEY = "processor time in seconds"


def processor_seconds() -> float:
    """Return the processor time of this process and of the children it has waited for."""
    return sum(os.times()[:4])


def slowness() -> float:
    """Return how many times longer than a second of processor time importing torch takes here; at least 1."""
    began = processor_seconds()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return max(1.0, processor_seconds() - began)


class Budget:
    """Measures every test and says at the end which were too long."""

    def __init__(self, shown: int, given_s: float | None) -> None:
        self.shown = shown
        self.given_s = given_s
        self.limit_s = self.given_s or LIMIT_S
        self.seconds: dict[str, float] = {}
        self.fast: set[str] = set()
        self.over: list[str] = []
        self._began = 0.0
        self._shared = 0.0
        self._nested = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self._began, self._shared = processor_seconds(), 0.0
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Generator[None, object, object]:
        if fixturedef.scope == "function" or self._nested:
            return (yield)
        began, self._nested = processor_seconds(), True
        try:
            return (yield)
        finally:
            self._nested = False
            self._shared += processor_seconds() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "call":
            report.user_properties.append((KEY, processor_seconds() - self._began - self._shared))
            report.user_properties.append(("slow", item.get_closest_marker("slow") is not None))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        facts: dict[str, Any] = dict(report.user_properties)
        if report.when == "call" and KEY in facts:
            self.seconds[report.nodeid] = facts[KEY]
            if not facts["slow"]:
                self.fast.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        self.judge()
        if self.over and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.shown:
            terminalreporter.section("processor time")
            for line in self._table():
                terminalreporter.write_line(line)
        for test in self.over:
            terminalreporter.write_line(
                f"{test} took {self.seconds[test]:.1f} s of processor time; a fast test may take {self.limit_s:.1f} s "
                "on this machine: make it cheaper or mark it slow",
                red=True,
            )

    def judge(self) -> None:
        """List the fast tests that took longer than this machine allows."""
        self.over = self._longer()
        if self.over and self.given_s is None:
            self.limit_s *= slowness()
            self.over = self._longer()

    def _longer(self) -> list[str]:
        return [test for test, seconds in self.seconds.items() if seconds > self.limit_s and test in self.fast]

    def _table(self) -> list[str]:
        folders: dict[str, float] = defaultdict(float)
        for test, seconds in self.seconds.items():
            folders[str(PurePosixPath(test.split("::")[0]).parent)] += seconds
        dearest = sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)[: self.shown]
        lines = [f"{seconds:8.1f} s  {folder}" for folder, seconds in sorted(folders.items())]
        lines.append(f"{sum(folders.values()):8.1f} s  in all, without what tests share")
        return lines + [f"{self.seconds[test]:8.2f} s  {test}" for test in dearest]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("processor time")
    group.addoption("--processor-time", type=int, default=0, metavar="N", help="show each folder's and the N dearest")
    group.addoption("--processor-limit", type=float, metavar="SECONDS", help="of a fast test")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budget(config.option.processor_time, config.option.processor_limit))
