"""Try kdctl's promises from outside, by the hundred and the thousand, and fail where one is broken.

    python benchmarks/campaign.py [PART...] [--short] [--seed 0] [--budget SECONDS] [--state FILE] [--only INDEX]

The parts are the modules of ``benchmarks/parts`` that have cases; without names all of them run, side by side, so that
a budget is shared. Every case is a function of the part, the seed and its index, and runs in a process of its own.
Prints how many cases of each part were tried and how many are broken, then every broken one and the command that
repeats it. With ``--state`` finished cases are kept in a file and skipped when the command is repeated; broken ones are
tried again.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from parts import warm
from parts.base import Broken, Part, load_part, part_names, promise

CASE_S = 900.0
POLL_S = 0.01


@dataclass(frozen=True)
class Case:
    """A case of a part."""

    part: str
    seed: int
    index: int


@dataclass(frozen=True)
class Outcome:
    """What a case found. broken: the message of a broken promise."""

    case: Case
    kind: str
    broken: str | None
    seconds: float


@dataclass
class State:
    """The outcomes so far, and the file that keeps them."""

    path: Path | None = None
    found: dict[Case, Outcome] = field(default_factory=dict)

    def load(self) -> None:
        """Read the file, if there is one; a last line that was cut is left out."""
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            case = Case(**entry.pop("case"))
            self.found[case] = Outcome(case, **entry)

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome."""
        self.found[outcome.case] = outcome
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(part_names())}, or the path of a module")
    parser.add_argument("--seed", type=int, default=0, help="what cases are drawn by; default 0")
    parser.add_argument("--short", action="store_true", help="the few cases of each part that the tests run")
    parser.add_argument("--budget", type=float, help="start no case after so many seconds; default no limit")
    parser.add_argument("--only", type=int, action="append", help="this case; repeatable; default all")
    parser.add_argument("--state", type=Path, help="JSON lines of finished cases, which are skipped; default none")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="cases at a time; default one a core"
    )
    parser.add_argument("--work", type=Path, help="folder that keeps broken cases; default a temporary one")
    found = parser.parse_args(words)
    if unknown := {name for name in found.parts if not Path(name).is_file()} - set(part_names()):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(part_names())}")
    return found


def planned(options: argparse.Namespace, parts: dict[str, Part]) -> list[Case]:
    """List the cases, those of all parts mixed evenly."""
    keyed = []
    for name, part in parts.items():
        count = part.SHORT if options.short else part.FULL
        indices = options.only or range(count)
        keyed += [((place + 1) / len(indices), name, index) for place, index in enumerate(indices)]
    return [Case(name, options.seed, index) for _, name, index in sorted(keyed)]


class Workers:
    """Runs cases side by side, each in a process of its own and an empty folder."""

    def __init__(self, parts: dict[str, Part], work: Path, count: int, keep: bool):
        self.parts, self.work, self.count, self.keep = parts, work, count, keep
        self.running: list[tuple[Case, warm.Running, Path]] = []

    def prepare(self, seed: int) -> None:
        """Make what the cases of a part share."""
        for name, part in self.parts.items():
            folder = self.work / name / "shared"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make = vars(part).get("prepare")
            if make is not None:
                warm.in_child(lambda make=make, folder=folder: make(seed, folder), folder, CASE_S)

    def start(self, case: Case) -> None:
        """Start a case."""
        where, answer = self.work / case.part / str(case.index), self.work / f"{case.part}-{case.index}.json"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        work = self.parts[case.part].case

        def told() -> None:
            try:
                found = {"kind": work(case.seed, case.index, where), "broken": None}
            except Broken as error:
                found = {"kind": "", "broken": str(error)}
            answer.write_text(json.dumps(found), encoding="utf-8")

        self.running.append((case, warm.start(told, where, what=f"{case.part} {case.index}"), answer))

    def ended(self) -> Iterator[Outcome]:
        """Yield the outcomes of cases that have ended."""
        for entry in list(self.running):
            case, running, answer = entry
            if not running.alive() or time.monotonic() > running.started + CASE_S:
                self.running.remove(entry)
                yield self.outcome(case, running, answer)

    def outcome(self, case: Case, running: warm.Running, answer: Path) -> Outcome:
        """Read what a case found, and remove its folder."""
        try:
            ended = running.wait(CASE_S)
            seconds, text = ended.seconds, answer.read_text(encoding="utf-8") if answer.exists() else ""
            found = json.loads(text) if text else {"kind": "", "broken": f"a fault of the case itself:\n{ended.err}"}
        except Broken as hang:
            seconds, found = CASE_S, {"kind": "", "broken": str(hang)}
        answer.unlink(missing_ok=True)
        if not (self.keep and found["broken"]):
            shutil.rmtree(self.work / case.part / str(case.index), ignore_errors=True)
        return Outcome(case, found["kind"], found["broken"], round(seconds, 2))

    def run(self, cases: Sequence[Case], until: float) -> Iterator[Outcome]:
        """Run cases, none of which starts after a time of the monotonic clock."""
        waiting = deque(cases)
        while self.running or (waiting and time.monotonic() < until):
            while waiting and len(self.running) < self.count and time.monotonic() < until:
                self.start(waiting.popleft())
            time.sleep(POLL_S)
            yield from self.ended()


def show(options: argparse.Namespace, parts: dict[str, Part], cases: Sequence[Case], state: State) -> int:
    """Print the table and what is broken; return how many cases are."""
    outcomes = [state.found[case] for case in cases if case in state.found]
    print(f"{'part':<14}{'planned':>9}{'tried':>9}{'broken':>9}  promise")
    for name, part in parts.items():
        own = [one for one in outcomes if one.case.part == name]
        count = sum(case.part == name for case in cases)
        print(f"{name:<14}{count:>9}{len(own):>9}{sum(one.broken is not None for one in own):>9}  {promise(part)}")
        kinds = Counter(one.kind for one in own if one.broken is None)
        print("".join(f"{'':<16}{kind}: {number}\n" for kind, number in sorted(kinds.items())), end="")
    broken = [one for one in outcomes if one.broken is not None]
    for one in broken:
        command = f"python benchmarks/campaign.py {one.case.part} --seed {one.case.seed} --only {one.case.index}"
        print(f"\n{one.case.part} {one.case.index}: {one.broken}\n    again: {command}")
    return len(broken)


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; return the exit code."""
    options = arguments(words)
    started = time.monotonic()
    state = State(options.state)
    state.load()
    with tempfile.TemporaryDirectory(prefix="campaign-") as temporary:
        work = options.work.resolve() if options.work else Path(temporary)
        warm.warm_up(work)
        parts = {Path(name).stem: load_part(name) for name in options.parts or part_names()}
        cases = planned(options, parts)
        again = [case for case in cases if case not in state.found or state.found[case].broken or options.only]
        workers = Workers(parts, work, options.workers, keep=options.work is not None)
        workers.prepare(options.seed)
        until = started + options.budget if options.budget else float("inf")
        for outcome in workers.run(again, until):
            state.add(outcome)
        return int(show(options, parts, cases, state) > 0)


if __name__ == "__main__":
    sys.exit(main())
