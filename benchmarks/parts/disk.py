"""When the disk fails once, kdctl ends with exit code 2 and the path, and the same command then finishes as ever.

All reads, writes, flushes, renames and removals of all stages fail one each, in turn by "no space left", "input/output
error", "permission denied" and a half-written file; further cases go through them with the next kind. Every seventh
case runs a stage on a real disk instead: a full one (where a tmpfs can be mounted), or with files of a limited size.
"""

import ctypes
import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from parts import finished
from parts.base import draw, expect, shared
from parts.finished import STAGES, check_message, contents, differences, left_over, printed
from parts.warm import Ended, run_kdctl

SHORT, FULL = 12, 2000
KINDS = ("ENOSPC", "EIO", "EACCES", "short")
SPREAD = 7
"""Operations between those that the short run tries."""
NEWNS, PRIVATE = 0x00020000, 0x44000


@dataclass(frozen=True)
class Undisturbed:
    """What a stage does and leaves."""

    operations: list[str]
    out: Any
    files: dict[str, str]


def prepare(seed: int, where: Path) -> None:
    """Lay out what the first stage starts from."""
    place = where / "place"
    place.mkdir()
    finished.prepare(place)


def planned(where: Path, last: str) -> dict[str, Undisturbed]:
    """Run the stages up to one undisturbed, each once for all cases, and return what they leave."""
    plan: dict[str, Undisturbed] = {}
    with FileLock(where / "lock"):
        for name in list(STAGES)[: list(STAGES).index(last) + 1]:
            kept = where / f"{name}.json"
            if not kept.exists():
                kept.write_text(json.dumps(_undisturbed(where, name)), encoding="utf-8")
            plan[name] = Undisturbed(**json.loads(kept.read_text(encoding="utf-8")))
    return plan


def _undisturbed(where: Path, name: str) -> dict[str, object]:
    """Run a stage, keeping what it starts from; return what it did and left."""
    place, counted = where / "place", where / "count"
    shutil.copytree(place, where / f"before {name}")
    ended = run_kdctl(STAGES[name], place, hook=lambda: _count(counted))
    expect(ended.code == 0, f"{name} ends undisturbed with {ended.code}: {ended.err[-2000:]}")
    operations = counted.read_text(encoding="utf-8").splitlines()
    counted.unlink()
    return {"operations": operations, "out": printed(ended.out), "files": contents(place)}


def _count(file: Path) -> None:
    from kdctl.run import files

    def before(operation: str, path: Path) -> None:
        with open(file, "a", encoding="utf-8") as kept:
            kept.write(f"{operation} {path.name}\n")

    files.before = before


def _fail(place: int, kind: str) -> Callable[[], None]:
    """Return what makes an operation fail."""

    def hook() -> None:
        from kdctl.run import files

        done = iter(range(1 << 30))

        def before(operation: str, path: Path) -> None:
            if next(done) != place:
                return
            if kind == "short" and operation == "write" and not path.is_dir() and path.parent.is_dir():
                with open(path, "ab") as file:
                    file.write(b'{"half')
            number = errno.ENOSPC if kind == "short" else getattr(errno, kind)
            raise OSError(number, os.strerror(number), str(path))

        files.before = before

    return hook


def case(seed: int, index: int, where: Path) -> str:
    """Let one operation of one stage fail, then repeat the stage."""
    stages = list(STAGES)
    plan = planned(
        shared(where), stages[0] if index < SHORT else stages[-1]
    )  # the short run makes the first stage only
    if index % 7 == 6:
        return _really(seed, index, where, plan)
    every = [(name, place) for name, one in plan.items() for place in range(len(one.operations))]
    number = (index - index // 7) * (SPREAD if index < SHORT else 1)
    name, place = every[number % len(every)]
    kind = KINDS[(number + number // len(every)) % len(KINDS)]
    what = f"{name}: {kind} at operation {place}, {plan[name].operations[place]}"
    shutil.copytree(shared(where) / f"before {name}", where, dirs_exist_ok=True)
    ended = run_kdctl(STAGES[name], where, hook=_fail(place, kind))
    result = _ended(ended, where, plan[name].out, what)
    _again(name, where, plan, what)
    return f"{name}: {result}"


def _ended(ended: Ended, where: Path, out: object, what: str) -> str:
    """Check how a disturbed run ended."""
    if ended.code == 0:
        expect(printed(ended.out) == out, f"{what}: goes on and prints something else: {ended.out[:600]}")
        return "done without it"
    check_message(ended, what)
    words = [word.strip("'\":;,.") for word in ended.err.split()]
    expect(any(word in ("r", "s.gguf") or "/" in word for word in words), f"{what}: names no path: {ended.err[-600:]}")
    return "exit code 2"


def _again(name: str, where: Path, plan: dict[str, Undisturbed], what: str) -> None:
    """Repeat a stage, which must leave what an undisturbed one does."""
    if name in ("gguf", "hqq", "dense"):  # an export does not overwrite one that is there
        found = differences(contents(where), plan[name].files)
        if not found:
            return
    ended = run_kdctl(STAGES[name], where)
    expect(ended.code == 0, f"{what}: repeated, it ends with {ended.code}: {ended.err[-1500:]}")
    expect(printed(ended.out) == plan[name].out, f"{what}: repeated, it prints something else: {ended.out[:600]}")
    expect(not left_over(where), f"{what}: leaves {left_over(where)}")
    found = differences(contents(where), plan[name].files)
    expect(not found, f"{what}: repeated, it differs in {list(found)[:6]}")


def _really(seed: int, index: int, where: Path, plan: dict[str, Undisturbed]) -> str:
    """Run a stage on a full disk, or with a limit on the size of a file."""
    rng = draw("disk", seed, index)
    name = rng.choice(list(plan))
    before = shared(where) / f"before {name}"
    if rng.random() < 0.5:
        limit = 1 << rng.randrange(8, 18)
        shutil.copytree(before, where, dirs_exist_ok=True)
        hook = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
        what = f"{name} with files of {limit} bytes at most"
        result = _ended(run_kdctl(STAGES[name], where, hook=hook), where, plan[name].out, what)
        _again(name, where, plan, what)
        return f"limit: {result}"
    place = where / "disk"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEWNS) or libc.mount(None, b"/", None, PRIVATE, None):
        return "tmpfs: not allowed here"
    if libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, b"size=64m"):
        return "tmpfs: not allowed here"
    shutil.copytree(before, place, dirs_exist_ok=True)
    free = shutil.disk_usage(place).free
    left = 1 << rng.randrange(12, 20)
    (place / "ballast").write_bytes(bytes(max(0, free - left)))
    what = f"{name} on a disk with {left} bytes left"
    result = _ended(run_kdctl(STAGES[name], place), place, plan[name].out, what)
    (place / "ballast").unlink()
    _again(name, place, plan, what)
    return f"tmpfs: {result}"
