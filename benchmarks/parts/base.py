"""What a part of the campaign is, and how the parts are found.

A part is a module of this folder with a function ``case``:

    SHORT, FULL: int                                   cases of the short run and of the whole one
    case(seed: int, index: int, where: Path) -> str    do case ``index`` in the empty folder ``where``; return its kind
    prepare(seed: int, where: Path) -> None            optional, once before all cases, in the folder ``shared(where)``

The first line of its docstring is the promise. A case draws everything from (seed, index), so that it can be repeated
alone, and raises Broken where the promise is. Each runs in a process of its own, forked from one that has imported
kdctl and runs nothing itself.
"""

import fcntl
import importlib.util
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

FOLDER = Path(__file__).parent


class Broken(Exception):
    """A promise is broken; the message says by what."""


class Part(Protocol):
    """A module of this folder that has cases."""

    SHORT: int
    FULL: int

    def case(self, seed: int, index: int, where: Path) -> str:
        """Do one case."""
        ...


def part_names() -> list[str]:
    """List the parts, by name."""
    return [path.stem for path in sorted(FOLDER.glob("*.py")) if "\ndef case(" in path.read_text(encoding="utf-8")]


def load_part(name: str) -> Part:
    """Import a part, by name or by the path of its file."""
    if not name.endswith(".py"):
        return cast(Part, importlib.import_module(f"parts.{name}"))
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Part, module)


def promise(part: Part) -> str:
    """Return what a part shows, in one line."""
    return (vars(part)["__doc__"] or "").strip().splitlines()[0]


def shared(where: Path) -> Path:
    """Return the folder that ``prepare`` filled, of a case's folder."""
    return where.parent / "shared"


def once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """Return a folder that the first case to ask has filled; the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            making = folder.with_name(f"{folder.name}.making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            make(making)
            making.rename(folder)
    return folder


def draw(*key: Any) -> random.Random:
    """Return a generator that depends on the key alone."""
    return random.Random("/".join(map(str, key)))


def expect(holds: bool, message: str) -> None:
    """Raise Broken unless something holds."""
    if not holds:
        raise Broken(message)
