"""Models made by any tool beside the first of them: distances, tasks and a report, without a preset of one's own."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdctl.base.errors import PresetError
from kdctl.base.progress import Reporter, Silent
from kdctl.config.resolve import build_preset
from kdctl.model.external import check_comparable
from kdctl.run.records import EvalResult
from kdctl.stages.context import Run, open_run
from kdctl.stages.evaluate import evaluate, open_foreign
from kdctl.stages.yardstick import ensure_measuring

LONGEST_NAME = 40
PRESET = {
    "description": "Models made by any tool, measured against the first of them, which stands here as the teacher.",
    "teacher": {},
    "quantize": {"method": "minmax", "group_size": 8},  # nothing is quantized: the group that divides most layers
    "eval": {"student_written": False},
}


def compare_models(
    references: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    reporter: Reporter | None = None,
) -> tuple[Run, dict[str, EvalResult]]:
    """Measure models of one tokenizer against the first of them, in a run folder of their own.

    references: folders, Hub ids or GGUF files, two or more; settings: dotted preset fields, those of evaluation mostly;
    folder: ``runs/compare-…`` without it, which goes on where it was. All are found, and their tokenizers compared,
    before any is loaded. Raises PresetError for fewer than two, ModelError for one that is not there or not comparable.
    """
    names = names_of(references)
    preset = build_preset(PRESET, {"teacher.model": references[0], **(settings or {})}, "compare")
    run = open_run(preset, folder or default_folder(references), reporter=reporter or Silent())
    others = [open_foreign(*run, name, reference) for name, reference in zip(names[1:], references[1:], strict=True)]
    for other in others:
        check_comparable(other, run.teacher.tokenizer(), run.teacher.config())
    measuring = ensure_measuring(*run)
    found: dict[str, EvalResult] = {}
    for other in others:
        found |= evaluate(*run, measuring, names=("teacher",), also=other)
    return run, found


def default_folder(references: Sequence[str]) -> Path:
    """Name the folder of a comparison after all that is compared."""
    return Path("runs") / f"compare-{hashlib.sha256(chr(0).join(references).encode()).hexdigest()[:8]}"


def names_of(references: Sequence[str]) -> list[str]:
    """Name rows after the last part of each reference, and more of it where that is not enough to tell them apart."""
    if len(references) < 2:
        raise PresetError("compare needs a model to measure against and at least one to measure; name two or more")
    for parts in range(1, 4):
        names = [_name(reference, parts) for reference in references]
        if len({*names[1:]} - {"teacher", "ptq"}) == len(names) - 1:
            return names
    raise PresetError(f"the models {', '.join(references[1:])} cannot be told apart by their names; name each once")


def _name(reference: str, parts: int) -> str:
    """Return the last parts of a path as a folder's name."""
    kept = [part for part in reference.rstrip("/").split("/") if part not in ("", ".", "..")][-parts:]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(kept))[-LONGEST_NAME:].lstrip(".-") or "model"
