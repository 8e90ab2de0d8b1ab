"""Whatever is damaged in a finished run folder is named with exit code 2, made again, or without effect.

A case damages one file of a finished run folder or of its cache: a flipped bit, a cut, nothing left, another file's
content, or no file at all. Then it runs a command that reads it.
"""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from parts import finished
from parts.base import draw, expect, shared
from parts.finished import check_message, contents, differences, left_over, printed, unlike
from parts.warm import run_kdctl

SHORT, FULL = 6, 2000
MADE = ("quantize", "rollout", "distill", "eval", "report", "compare", "sweep")
KINDS = ("bit", "bit", "bit", "cut", "empty", "deleted", "swapped")
FINISHED = re.compile(r"/(results|distill|quantize|preset|compare/\w+)\.json$")
LOOK: dict[str, tuple[str, ...]] = {
    "quantize": ("quantize", "--run", "r", "--json"),
    "rollout": ("rollout", "--run", "r", "--source", "teacher", "--json"),
    "resume": ("distill", "--run", "r", "--name", "u", "--json"),
    "distill": ("distill", "--run", "r", "--name", "v", "--json"),
    "eval": ("eval", "ptq", "v", "--run", "r", "--json"),
    "measure": ("eval", "ptq", "--run", "r", "--force", "--json"),
    "measure v": ("eval", "v", "--run", "r", "--force", "--json"),
    "report": ("report", "r", "--table", "json"),
    "compare": ("quantize", "--run", "r", "--compare", "minmax", "--json"),
    "verify": ("verify", "r/student", "--json"),
    "verify v": ("verify", "r/distill/v/final", "--json"),
    "export": ("export", "r/student", "--to", "gguf", "--out", "again.gguf", "--json"),
    "sweep": ("sweep", "s.yaml", "--run", "r", "--no-eval", "--json"),
}
READERS = (
    (r"^cache/", ("measure", "resume", "quantize")),
    (r"^r/preset", ("quantize", "report", "rollout", "distill", "eval")),
    (r"^r/student/", ("quantize", "measure", "verify", "export", "report", "resume", "distill")),
    (r"^r/rollouts/heldout/", ("measure", "resume", "eval")),
    (r"^r/rollouts/", ("rollout", "resume", "distill", "report")),
    (r"^r/distill/u/", ("resume",)),
    (r"^r/distill/v/final/", ("measure v", "verify v", "report", "eval")),
    (r"^r/distill/", ("distill", "report", "sweep")),
    (r"^r/eval/", ("report", "eval")),
    (r"^r/compare/", ("compare", "report")),
    (r"^r/sweeps/", ("sweep",)),
    (r"", ("report",)),
)
"""Which commands read a file, by its path."""


def prepare(seed: int, where: Path) -> None:
    """Make the run folder once."""
    place = where / "place"
    place.mkdir()
    finished.prepare(place)
    for name in MADE:
        finished.stage(name, place)
    finished.unfinish(place / "r")


def expected(where: Path, look: str) -> tuple[Any, dict[str, str]]:
    """Return what a command prints and leaves of the whole folder; it is run once for all cases."""
    kept = where / f"{look}.json"
    with FileLock(where / f"{look}.lock"):
        if not kept.exists():
            copy = shutil.copytree(where / "place", where / f"{look} of the whole")
            ended = run_kdctl(LOOK[look], copy)
            expect(ended.code == 0, f"{look} of a whole folder: {ended.err[-1500:]}")
            kept.write_text(json.dumps([printed(ended.out), contents(copy)]), encoding="utf-8")
            shutil.rmtree(copy)
    out, files = json.loads(kept.read_text(encoding="utf-8"))
    return out, files


def damage(kind: str, path: Path, rng: random.Random) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    if kind == "deleted":
        path.unlink()
        return
    if kind == "bit" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data) + 1) :]
    elif kind == "empty":
        data.clear()
    elif kind == "swapped":
        others = [each for each in path.parents[1].rglob(f"*{path.suffix}") if each != path and each.is_file()]
        data[:] = rng.choice(sorted(others)).read_bytes() if others else b"other"
    path.write_bytes(data)


def case(seed: int, index: int, where: Path) -> str:
    """Damage one file and look whether it is noticed."""
    rng, base = draw("corruption", seed, index), shared(where)
    shutil.copytree(base / "place", where, dirs_exist_ok=True)
    files = sorted(
        path for top in ("r", "cache") for path in (where / top).rglob("*") if path.is_file() and path.suffix != ".lock"
    )
    path, kind = rng.choice(files), rng.choice(KINDS)
    name = path.relative_to(where).as_posix()
    look = rng.choice(next(words for pattern, words in READERS if re.search(pattern, name)))
    whole = path.read_bytes()
    damage(kind, path, rng)
    damaged = path.read_bytes() if path.exists() else None
    ended = run_kdctl(LOOK[look], where)
    what = f"{name} ({kind}) read by kdctl {' '.join(LOOK[look])}"
    if look.startswith("verify") and ended.code == 1:
        expect("Traceback" not in ended.err, f"{what}: {ended.err[-1500:]}")
        return "noticed"
    if ended.code:
        check_message(ended, what)
        expect(path.name in ended.err or path.parent.name in ended.err, f"{what} is not named: {ended.err[-800:]}")
        return "noticed"
    if kind == "deleted" and look == "report" and FINISHED.search(name):
        return "counts as not done"  # a record that is written last says that something is finished
    out, made = expected(base, look)
    expect(printed(ended.out) == out, f"{what}: prints something else: {unlike(printed(ended.out), out)}")
    expect(not left_over(where), f"{what}: leaves {left_over(where)}")
    now = path.read_bytes() if path.exists() else None
    others = [each for each in differences(contents(where), made) if each != f"/{name}"]
    expect(not others, f"{what}: makes {others[:5]} differ from what is made of a whole folder")
    return "without effect" if now == damaged and damaged != whole else "made again" if now != damaged else "no damage"
