"""Checks files of text before they are parsed, where parsers give no place, or crash."""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kdctl.base.errors import DataError

DEEPEST = 200
"""Nesting of JSON; messages with tools have ten levels. Arrow's reader overflows the stack at thousands."""
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MAGIC = {
    b"\x1f\x8b": "compressed by gzip; give it the ending .gz",
    b"BZh": "compressed by bzip2; give it the ending .bz2",
    b"\xfd7zXZ": "compressed by xz; give it the ending .xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; give it the ending .zst",
    b"PAR1": "Parquet; give it the ending .parquet",
    b"ARROW1": "Arrow; save it as Parquet",
}

KINDS = {str: "text", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def check_text_file(path: Path, kind: str) -> None:
    """Raise DataError, with the line, for text that is not UTF-8 or, of the kind json, nested too deeply."""
    opened = OPENERS.get(path.suffix.lower())
    if opened is None and path.suffix.lower() == ".zst":
        return  # read by a package that datasets knows
    depth = 0
    try:
        with opened(path) if opened else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                _check_encoding(path, number, line)
                depth = _depth_after(line, depth) if kind == "json" else 0
                if depth > DEEPEST:
                    raise DataError(f"{path.absolute()} is nested more than {DEEPEST} deep in line {number}")
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(
            f"the prompt file {path.absolute()} cannot be unpacked: {error}; it is damaged or not what its ending says"
        ) from None


def _check_encoding(path: Path, number: int, line: bytes) -> None:
    try:
        if "\0" not in line.decode():
            return
    except UnicodeDecodeError:
        pass
    found = next((words for magic, words in MAGIC.items() if number == 1 and line.startswith(magic)), None)
    reason = f"is {found}" if found else f"is not UTF-8 text in line {number}: {line[:40]!r}; save it as UTF-8"
    raise DataError(f"the prompt file {path.absolute()} {reason}")


def _depth_after(line: bytes, depth: int) -> int:
    """Return how deep JSON is nested after a line, or the first depth in it that is too deep."""
    bare = STRING.sub(b"", line)
    openings, closings = bare.count(b"[") + bare.count(b"{"), bare.count(b"]") + bare.count(b"}")
    if depth + openings <= DEEPEST:
        return max(0, depth + openings - closings)
    for character in bare:
        depth += (character in b"[{") - (character in b"]}")
        if depth > DEEPEST:
            break
    return max(0, depth)


def why_not_json(path: Path) -> str | None:
    """Say where a file of JSON is broken, None if it is not; parsers count rows of a block, from zero."""
    opened = OPENERS.get(path.suffix.lower())
    if path.suffix.lower() == ".zst":
        return None
    with opened(path) if opened else open(path, "rb") as file:
        content = file.read()
    found = _broken_line(content.splitlines())
    if "json" in path.name.lower().split("."):  # one value over all lines, or one in each
        try:
            _parsed(content)
            return None
        except json.JSONDecodeError as error:
            found = found if error.msg == "Extra data" else (error.lineno, _reason(error))
    return found and f"the prompt file {path.absolute()} cannot be read in line {found[0]}: {found[1]}"


def _broken_line(lines: Iterable[bytes]) -> tuple[int, str] | None:
    """Find the first line that is not JSON, else the first with a value of another kind than the lines before it."""
    kinds: dict[str, str] = {}
    found = None
    for number, line in enumerate(lines, 1):
        try:
            row = _parsed(line) if line.strip() else None
        except json.JSONDecodeError as error:
            return number, _reason(error)
        for key, value in {"the row": row, **(row if isinstance(row, dict) else {})}.items():
            kind = KINDS.get(type(value))
            if kind and kinds.setdefault(key, kind) != kind:
                found = found or (number, f"{key:.80} is {kind}, and in the lines before {kinds[key]}")
    return found


def _parsed(content: bytes) -> Any:
    return json.loads(content, parse_int=float)  # because int takes 4300 digits, and Arrow any number


def _reason(error: json.JSONDecodeError) -> str:
    return f"this is no JSON: {error.msg} (column {error.colno})"
