"""JSON records on disk: written atomically with a hash of their own text, checked when they are read."""

import re
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from kdctl.base.errors import StoreError
from kdctl.base.sums import with_sum, without_sum
from kdctl.run.files import read_bytes, write_text

RecordT = TypeVar("RecordT", bound=BaseModel)

REMEDIES = (
    (r"/distill/[^/]+/checkpoints/(step_\d+)/", r"remove {folder} to go on from an earlier checkpoint or the start"),
    (r"/distill/([^/]+)/", r"kdctl distill --run {run} --name \1 --force trains the variant again"),
    (r"/eval/[^/]+/rollouts/", r"remove {folder}, and kdctl eval --run {run} --force writes it again"),
    (r"/eval/([^/]+)/", r"kdctl eval \1 --run {run} --force measures it again"),
    (r"/compare/([^/]+)\.json$", r"kdctl quantize --run {run} --compare \1 --force measures it again"),
    (r"/rollouts/heldout/", r"remove {folder}, and the same command writes the same completions again"),
    (r"/rollouts/(\w+)/", r"kdctl rollout --run {run} --source \1 --force writes it again"),
    (r"/sweeps/[^/]+/journal\.log$", "remove it: finished variants are kept, and the same sweep takes them up again"),
    (r"/student/", r"kdctl quantize --run {run} --force makes the student again"),
    (
        r"/preset\.json$",
        "put back what was there or, where it was edited on purpose, remove it and name the preset with --preset and "
        "--set: every stage compares it with what it made",
    ),
)
"""What makes a file of a run folder again, by its path; the first that fits."""


def remedy(path: Path) -> str:
    """Say how a damaged file of a run folder is made again."""
    for pattern, words in REMEDIES:
        if found := re.search(pattern, f"/{path.as_posix()}"):
            run = path.as_posix()[: max(0, found.start() - 1)] or ("." if found.start() == 0 else "/")
            return found.expand(words).replace("{folder}", str(path.parent)).replace("{run}", run)
    return f"remove {path}, and the command that wrote it makes it again"


def damaged(path: Path, why: object) -> StoreError:
    """Make the error for a file that is not what was written."""
    return StoreError(f"{path} is damaged or of another kdctl version: {why}; {remedy(path)}")


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record as indented JSON, atomically, with the hash of its text as its last field."""
    write_text(path, with_sum(record.model_dump_json(indent=2) + "\n"))


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Read a record. Raises StoreError if the file is missing, is not what was written or does not fit the record."""
    try:
        return kind.model_validate_json(read_plain(path))
    except ValidationError as error:
        raise damaged(path, first_problem(error)) from None


def read_plain(path: Path) -> str:
    """Return a record's text without its hash. Raises StoreError if it is missing or not what was written."""
    try:
        return without_sum(read_bytes(path).decode())
    except FileNotFoundError:
        raise StoreError(
            f"{path} is missing; the stage that writes it has not finished, or it was lost: {remedy(path)}"
        ) from None
    except ValueError as error:
        raise damaged(path, error) from None


def first_problem(error: ValidationError) -> str:
    """Say what is wrong in one line: the first field that does not fit, and how many more."""
    first, *others = error.errors(include_url=False)
    name = ".".join(map(str, first["loc"]))
    reason = " ".join(f"{name}: {first['msg']}".removeprefix(": ").split())
    return f"{reason} (and {len(others)} more)" if others else reason
