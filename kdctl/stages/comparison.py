"""Models made by any tool beside the first of them: distances, tasks and a report, without a preset of one's own."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from kdctl.base.errors import ModelError, PresetError
from kdctl.base.progress import Reporter, Silent
from kdctl.config.resolve import COMPARISON, build_preset
from kdctl.eval import distribution
from kdctl.formats.export import GGUF_FILE
from kdctl.model.architecture import decoder_layers
from kdctl.model.configuration import read_config
from kdctl.model.external import Foreign, check_comparable, find_foreign, load_foreign
from kdctl.model.teacher import Teacher
from kdctl.run.record_files import write_record
from kdctl.run.records import EvalResult
from kdctl.stages.context import Run, open_run
from kdctl.stages.evaluate import evaluate
from kdctl.stages.served_model import (
    Address,
    address_of,
    check_first,
    check_served,
    check_unnamed,
    is_address,
    measure_served,
)
from kdctl.stages.yardstick import Measuring, ensure_measuring

LONGEST_NAME = 40
DOCUMENTS = 24
"""Held-out completions on which single layers are measured."""
PRESET = {
    "description": COMPARISON,
    "teacher": {},
    "quantize": {"method": "minmax", "group_size": 8},  # nothing is quantized: the group that divides most layers
    "eval": {"student_written": False},
}


def compare_models(
    references: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    reporter: Reporter | None = None,
    by_layer: bool = False,
) -> tuple[Run, dict[str, EvalResult]]:
    """Measure models of one tokenizer against the first of them, in a run folder of their own.

    references: folders, Hub ids, GGUF files or addresses of servers, two or more; settings: dotted preset fields, those
    of evaluation mostly; folder: ``runs/compare-…`` without it, which goes on where it was; by_layer: also measure what
    each decoder layer of a model costs alone. All are found, and their tokenizers compared, before any is loaded.
    Raises PresetError for fewer than two or a server first, ModelError for one that is not there or not comparable.
    """
    names = names_of(references)
    check_first(references[0])
    preset = build_preset(PRESET, {"teacher.model": references[0], **(settings or {})}, "compare")
    teacher = Teacher(preset.teacher, preset.runtime)
    named = list(zip(names[1:], references[1:], strict=True))
    servers = [Address(name, address_of(reference)) for name, reference in named if is_address(reference)]
    others = [
        find_foreign(name, reference, teacher.dtype, teacher.offline)
        for name, reference in named
        if not is_address(reference)
    ]
    for other in others:
        check_comparable(other, teacher.tokenizer(), teacher.config())
        if by_layer:
            _check_layers(other, teacher)
    tasks = {}
    if preset.eval.tasks:
        from kdctl.eval.tasks import build_tasks  # lm-eval takes seconds to import

        tasks = build_tasks(preset.eval, teacher.offline)
    for server in servers:
        check_served(server, tasks, preset.rollout, by_layer=by_layer)
    run = open_run(preset, folder or default_folder(references), reporter=reporter or Silent())
    measuring = ensure_measuring(*run)
    check_unnamed(run.context, measuring, servers)
    served = {server.name: measure_served(run.context, measuring, server, tasks) for server in servers}
    found: dict[str, EvalResult] = {}
    for other in others:
        found |= evaluate(*run, measuring, names=("teacher",), also=other)
        if by_layer and not found[other.name].layers:
            found[other.name] = _with_layers(run, measuring, other, found[other.name])
    if not others:
        found |= evaluate(*run, measuring, names=("teacher",))
    return run, found | served


def _check_layers(other: Foreign, teacher: Teacher) -> None:
    """Raise ModelError for a model whose decoder layers cannot stand in the place of the first model's."""
    for name in ("num_hidden_layers", "hidden_size"):
        own, theirs = (
            getattr(config.get_text_config(decoder=True), name)
            for config in (teacher.config(), read_config(other.folder))
        )
        if own != theirs:
            raise ModelError(
                f"{other.reference} has {name}={theirs} and {teacher.settings.model} {own}, so no layer of one can "
                "stand in the other's place; leave --by-layer out"
            )


def _with_layers(run: Run, measuring: Measuring, other: Foreign, result: EvalResult) -> EvalResult:
    """Add what each layer of a model costs alone: in the place of the first model's, on a part of the yardstick."""
    teacher = run.teacher
    own = decoder_layers(teacher.load())
    others = decoder_layers(load_foreign(other, teacher.dtype, teacher.device))
    yardstick, layers = measuring.yardstick(DOCUMENTS), []
    with run.context.reporter.task(f"the layers of {other.name}", "layers") as advance:
        for place, theirs in enumerate(others):
            with standing_in(own, place, theirs):
                layers.append(distribution.summarize(distribution.compare(teacher.load(), yardstick)).forward_kl)
            advance(place + 1, len(own))
    found = result.model_copy(update={"layers": tuple(layers)})
    write_record(run.context.paths.results(other.name), found)
    return found


@contextmanager
def standing_in(layers: nn.ModuleList, place: int, other: nn.Module) -> Iterator[None]:
    """Have another layer in the place of one."""
    kept = layers[place]
    layers[place] = other
    try:
        yield
    finally:
        layers[place] = kept


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
    """Return the last parts of a path as a folder's name; every exported GGUF file is named like any other."""
    kept = [part for part in reference.rstrip("/").split("/") if part not in ("", ".", "..")]
    kept = (kept[:-1] if kept[-1:] == [GGUF_FILE] and len(kept) > 1 else kept)[-parts:]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(kept))[-LONGEST_NAME:].lstrip(".-") or "model"
