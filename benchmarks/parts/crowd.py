"""Any number of processes may work on one folder, sweep or cache: no result is lost, and none is made twice.

Two to eight start at random moments; some are ended by SIGKILL or Ctrl-C. Then one more runs to its end. What it leaves
equals what an undisturbed run leaves but for how long things took, and a log of all renames shows each result once.
"""

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL

from parts import tiny
from parts.base import draw, expect, once, shared
from parts.folders import differences, leftovers
from parts.killed import SWEEP, finished
from parts.warm import Ended, Running, run_kdctl, start_kdctl

SHORT, FULL = 1, 48

RESULTS = ("student", "manifest.json", "results.json", "distill.json", "quantize.json")
"""What is there once it is finished. (A variant's ``final/`` is made again where a kill came before distill.json.)"""
STAGE = ("--preset", "preset.json", "--run", "run")
SHARDS = 2


@dataclass(frozen=True)
class Crowd:
    """What processes do to one thing. last: the command that then finishes it."""

    commands: tuple[tuple[str, ...], ...]
    last: tuple[str, ...]
    refused: str = ""
    """What a process may be told, with exit code 2, instead of waiting."""


RUN = ("run", "preset.json", "--run", "run")
GGUF = tuple(("quantize", "--preset", "gguf.json", "--run", f"runs/{index}") for index in range(4))
CROWDS = {
    "one folder": Crowd((RUN, *((stage, *STAGE) for stage in ("quantize", "rollout", "distill", "eval"))), RUN),
    "one sweep": Crowd(
        tuple(("sweep", "sweep.json", "--run", "run", "--shard", f"{index}/{SHARDS}") for index in range(SHARDS)),
        ("sweep", "sweep.json", "--run", "run"),
        "already",
    ),
    "one cache": Crowd(GGUF, GGUF[0]),
    "one stage": Crowd((("distill", *STAGE),), RUN),
}


@dataclass(frozen=True)
class Member:
    """One process: when it starts, and when and how it is ended, in seconds from the first."""

    command: tuple[str, ...]
    starts: float
    ends: float | None
    number: int


def write_inputs(folder: Path) -> None:
    """Write what the commands read."""
    folder.mkdir(exist_ok=True)
    tiny.make_model(folder / "model")
    tiny.write_preset(folder / "preset.json", "model")
    (folder / "sweep.json").write_text(json.dumps(SWEEP))
    tiny.make_model(folder / "merging", vocab_size=266, eos_token_id=260, pad_token_id=260)
    tiny.byte_tokenizer([("t", "h"), ("h", "e")]).save_pretrained(folder / "merging")
    tiny.write_preset(folder / "merging.json", "merging")
    tiny.write_preset(folder / "gguf.json", "teacher.gguf")
    finished(run_kdctl(("quantize", "--preset", "merging.json", "--run", "made"), folder))
    finished(run_kdctl(("export", "made/student", "--out", "teacher.gguf"), folder))
    for made in ("made", "cache"):
        shutil.rmtree(folder / made)


def undisturbed(name: str, folder: Path) -> tuple[Path, Path, float]:
    """Return the inputs, the folder in which the last command ran alone, and its seconds; they are made once."""

    def make(root: Path) -> None:
        shutil.copytree(inputs, root / "after")
        ended = finished(run_kdctl(CROWDS[name].last, root / "after"))
        (root / "seconds.json").write_text(json.dumps(ended.seconds))

    inputs = once(folder / "crowd-inputs", write_inputs)
    root = once(folder / f"crowd-{name.replace(' ', '-')}", make)
    return inputs, root / "after", json.loads((root / "seconds.json").read_text())


def members(crowd: Crowd, generator: random.Random, seconds: float) -> list[Member]:
    """Draw who takes part."""
    found = []
    for _ in range(generator.randint(2, 8)):
        starts = generator.uniform(0, seconds)
        lasts = generator.choice([None, generator.uniform(0, 2 * seconds)])
        ends = None if lasts is None else starts + lasts
        found.append(Member(generator.choice(crowd.commands), starts, ends, generator.choice([SIGKILL, SIGINT])))
    return found


def logging(log: Path) -> Callable[[], None]:
    """Return what makes a process add every rename to a file."""

    def hook() -> None:
        from kdctl.run import files

        rename, handle = files.rename, os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def logged(path: Path, target: Path) -> None:
            rename(path, target)
            os.write(handle, f"{target}\n".encode())

        files.rename = logged

    return hook


def together(crowd: Sequence[Member], where: Path, log: Path) -> list[Ended]:
    """Start and end everybody at their moments, and return how each ended."""
    begun, running, ended = time.monotonic(), dict[Member, Running](), set[Member]()
    while len(ended) < len(crowd):
        now = time.monotonic() - begun
        for one in crowd:
            if one not in running and now >= one.starts:
                running[one] = start_kdctl(one.command, where, hook=logging(log))
            elif one in running and one not in ended and not running[one].alive():
                ended.add(one)
            elif one in running and one not in ended and one.ends is not None and now >= one.ends:
                running[one].kill(one.number)
                ended.add(one)
        time.sleep(0.01)
    return [running[one].wait() for one in crowd]


def case(seed: int, index: int, where: Path) -> str:
    """Let a crowd loose, finish and compare."""
    name, generator = list(CROWDS)[index % len(CROWDS)], draw("crowd", seed, index)
    crowd = CROWDS[name]
    inputs, after, seconds = undisturbed(name, shared(where))
    shutil.copytree(inputs, where, dirs_exist_ok=True)
    drawn, log = members(crowd, generator, seconds), where / "renames.log"
    told = f"{name}, {len(drawn)} processes"
    for one, ended in zip(drawn, together(drawn, where, log), strict=True):
        stopped = {SIGKILL: -9, SIGINT: 130}[one.number] if one.ends is not None else 0
        refused = bool(crowd.refused) and ended.code == 2 and crowd.refused in ended.err
        expect(ended.code in (0, stopped) or refused, f"{told}: {one}: exit code {ended.code}: {ended.err[-3000:]}")
        expect("Traceback" not in ended.err, f"{told}: {one}: {ended.err[-3000:]}")
    ended = run_kdctl(crowd.last, where, hook=logging(log))
    expect(ended.code == 0, f"{told}, the last: exit code {ended.code}: {ended.err[-3000:]}")
    check(told, crowd, after, where, log)
    return name


def check(told: str, crowd: Crowd, after: Path, where: Path, log: Path) -> None:
    """Compare with the undisturbed run, and look for results that were made twice."""
    place = crowd.last[crowd.last.index("--run") + 1]
    found = differences(after / place, where / place)
    expect(not found, f"{told}: " + "; ".join(found))
    left = leftovers(where)
    expect(not left, f"{told}: left behind: {', '.join(left)}")
    made = Counter(line for line in log.read_text().splitlines() if Path(line).name in RESULTS)
    twice = [f"{path} {count} times" for path, count in made.items() if count > 1]
    expect(not twice, f"{told}: made {', '.join(twice)}")
