"""What two run folders must have in common, and what a finished run must not leave behind."""

import fnmatch
import hashlib
import json
from pathlib import Path
from typing import Any

TEMPORARY = (".*.tmp", "*.new", "*.new.*", "*.old", ".*.part", "*.incomplete")
CLOCK = ("seconds", "_s", "since", "peak_", "rate", "per_second", "time")
"""Ends and starts of names of what depends on the clock or the machine's load."""


def leftovers(folder: Path) -> list[str]:
    """List temporary files and folders that are left, relative to ``folder``."""
    found = [path for path in folder.rglob("*") if any(fnmatch.fnmatch(path.name, one) for one in TEMPORARY)]
    return sorted(str(path.relative_to(folder)) for path in found)


def differences(one: Path, other: Path) -> list[str]:
    """Say how two run folders differ in more than how long things took."""
    first, second = files(one), files(other)
    found = [f"{name} is missing" for name in sorted(first - second)]
    found += [f"{name} should not be there" for name in sorted(second - first)]
    return found + [f"{name}: {said}" for name in sorted(first & second) if (said := compare(one / name, other / name))]


def files(folder: Path) -> set[str]:
    """List a folder's files, locks left out."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def compare(one: Path, other: Path) -> str:
    """Say how two files differ, in a few words; nothing where they are alike."""
    if one.read_bytes() == other.read_bytes():
        return ""
    if one.name == "SHA256SUMS":
        return sums_differ(one, other)
    if one.suffix == ".json":
        return trees_differ(read(one), read(other))
    if one.suffix == ".jsonl":
        return trees_differ(lines(one), lines(other))
    return "" if timed(one) else "other bytes"


def timed(path: Path) -> bool:
    """Tell whether a file tells times in text: the report's pages and the journal of a sweep."""
    return "report" in path.parts or path.name == "journal.log" or path.suffix == ".log"


def sums_differ(one: Path, other: Path) -> str:
    """Compare the names, and the other file's hashes with its files."""
    entries = [[line.split(maxsplit=1) for line in path.read_text().splitlines()] for path in (one, other)]
    if [name for _, name in entries[0]] != [name for _, name in entries[1]]:
        return "other names"
    wrong = [n for value, n in entries[1] if hashlib.sha256((other.parent / n).read_bytes()).hexdigest() != value]
    return f"wrong for {', '.join(wrong)}" if wrong else ""


def read(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[Any]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trees_differ(one: Any, other: Any, place: str = "") -> str:
    """Say where two JSON values differ first, clocks left out."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{place} has other keys: {sorted(one.keys() ^ other.keys())}"
        keys = [key for key, value in one.items() if not clock(key, value)]
        return next(filter(None, (trees_differ(one[key], other[key], f"{place}.{key}") for key in keys)), "")
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{place} has {len(other)} entries, not {len(one)}"
        pairs = enumerate(zip(one, other, strict=True))
        return next(filter(None, (trees_differ(a, b, f"{place}[{i}]") for i, (a, b) in pairs)), "")
    return "" if one == other else f"{place} is {other!r}, not {one!r}"


def clock(name: str, value: Any) -> bool:
    """Tell whether a field holds a time, or the hash of a record or of metrics that hold times."""
    hashed = name in ("sum", "metrics") and isinstance(value, str)
    return hashed or name.endswith(CLOCK) or name.startswith(CLOCK)
