"""Whatever is damaged in a finished run folder is named with exit code 2, made again, or without effect.

A case damages one file of a finished run folder or of its cache: a flipped bit, a cut, nothing left, another file's
content, or no file at all. Then it runs a command that reads it.
"""

import json
import random
import re
import shutil
from pathlib import Path

from parts import finished
from parts.base import draw, expect, shared
from parts.finished import check_message, contents, differences, left_over, printed
from parts.warm import run_kdctl

SHORT, FULL = 12, 2000
KINDS = ("bit", "bit", "bit", "cut", "empty", "deleted", "swapped")
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
    """Make the run folder once, and what each command prints of it."""
    finished.prepare(where)
    for name in finished.STAGES:
        finished.stage(name, where)
    finished.unfinish(where / "r")
    for path in ("r/student-gguf", "r/student-hqq", "r/distill/v/final-dense"):
        shutil.rmtree(where / path, ignore_errors=True)
    expected = {}
    for name, words in LOOK.items():
        copy = shutil.copytree(where, where.parent / "once")
        ended = run_kdctl(words, copy)
        expect(ended.code == 0, f"{name} of a whole folder: {ended.err[-1500:]}")
        expected[name] = {"out": printed(ended.out), "files": contents(copy)}
        shutil.rmtree(copy)
    (where / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


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
    shutil.copytree(base, where, dirs_exist_ok=True, ignore=shutil.ignore_patterns("expected.json"))
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
    expected = json.loads((base / "expected.json").read_text(encoding="utf-8"))[look]
    expect(printed(ended.out) == expected["out"], f"{what}: prints something else: {ended.out[:600]}")
    expect(not left_over(where), f"{what}: leaves {left_over(where)}")
    now = path.read_bytes() if path.exists() else None
    others = [each for each in differences(contents(where), expected["files"]) if each != f"/{name}"]
    expect(not others, f"{what}: makes {others[:5]} differ from what is made of a whole folder")
    return "without effect" if now == damaged and damaged != whole else "made again" if now != damaged else "no damage"
