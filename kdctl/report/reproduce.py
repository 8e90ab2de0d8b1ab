"""What a report was made from, and the commands that make it again."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from kdctl.config.preset import DistillSection, Preset, TeacherSection
from kdctl.report.study import Model, Source, Study
from kdctl.report.tables import Block, Cell, Column, Table, without_empty

NEW = "NEW"


def provenance(study: Study) -> Table:
    """List fingerprints, versions and what every model was evaluated on."""
    rows = []
    for model in study.models:
        result, folder = model.result, model.distilled or model.quantized
        made = result or folder
        rows.append(
            (
                Cell(model.name),
                Cell(", ".join(model.folders)),
                Cell(result.weights[:16] if result else None),
                Cell(folder.identity if folder else None),
                Cell(result.identity if result else None),
                Cell("all" if result and result.limit is None else result.limit if result else None),
                Cell(f"kdctl {made.versions.kdctl}, torch {made.versions.torch}" if made else None),
            )
        )
    columns = (
        Column("model", "model"),
        Column("folder", "folder"),
        Column("weights", "weights"),
        Column("identity", "made from"),
        Column("evaluation", "evaluated as"),
        Column("limit", "documents a task"),
        Column("versions", "versions"),
    )
    note = "First 16 hexadecimal digits of fingerprints; report.json holds everything in full."
    return without_empty(Table("provenance", "Fingerprints", columns, (Block("", tuple(rows)),), (note,)))


def _own(study: Study, source: Source) -> list[Model]:
    """List the models of a folder."""
    return [model for model in study.models if source.name in model.folders]


def _is_comparison(own: Sequence[Model]) -> bool:
    """Tell whether a folder holds what ``kdctl compare`` makes: models made elsewhere, and no student."""
    kinds = {model.kind for model in own}
    return "foreign" in kinds and kinds <= {"teacher", "foreign"}


def settings(study: Study, source: Source) -> list[str]:
    """Say what a folder's models have in common, as list items."""
    if source.preset is None:
        return [f"{source.name}: the folder has no preset.json"]
    teacher, quantize, distill = source.preset.teacher, source.preset.quantize, source.preset.distill
    grid = "symmetric" if quantize.symmetric else "asymmetric"
    first = (
        f"teacher `{teacher.model}`" + (f" at `{teacher.revision}`" if teacher.revision else "") + f", {teacher.dtype}"
    )
    own = _own(study, source)
    result = next((model.result for model in own if model.result), None)
    tasks = tuple(result.tasks) if result else source.preset.eval.tasks
    if _is_comparison(own):
        return [first, f"tasks: {', '.join(tasks) or 'none'}"]
    return [
        first,
        f"{quantize.bits} bits, group size {quantize.group_size}, {grid}, {quantize.method}",
        f"training, where a row does not say otherwise: {distill.steps} steps of {distill.rows_per_step} sequences, "
        f"learning rate {distill.lr:g}, {distill.learns}",
        f"tasks: {', '.join(tasks) or 'none'}",
    ]


def commands(study: Study, source: Source) -> list[str]:
    """List the commands that repeat a folder's results in a new one."""
    if source.preset is None:
        return []
    own = _own(study, source)
    if _is_comparison(own):
        return [_compare(own, source.preset)]
    lines = [f"kdctl quantize --preset {shlex.quote(str(source.run.preset))} --run {NEW}"]
    lines += [_distill(model, source.preset) for model in own if model.kind == "variant" and model.run == source.run]
    options = _eval_options(own, source.preset)
    lines.append(f"kdctl eval --run {NEW}{options}")
    lines += [_foreign(model) + options for model in own if model.kind == "foreign"]
    return [*lines, f"kdctl report --run {NEW}"]


def _distill(model: Model, preset: Preset) -> str:
    """Write the command of one variant: what differs from the preset, and its name."""
    if model.distilled is None:
        return ""
    section = DistillSection.model_validate(model.distilled.settings)
    base = preset.distill.model_dump(mode="json")
    changed = {key: value for key, value in section.model_dump(mode="json").items() if value != base[key]}
    fields = {f"distill.{key}": value for key, value in changed.items() if value is not None}
    length = model.settings.max_new_tokens
    if section.live and length is not None and length != preset.rollout.max_new_tokens:
        fields["rollout.max_new_tokens"] = length
    if model.distilled.mix != preset.prompts.mix and model.distilled.mix is not None:
        fields["prompts.mix"] = model.distilled.mix
    sets = "".join(f" --set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in fields.items())
    return f"kdctl distill --run {NEW} --name {shlex.quote(model.key)}{sets}"


def _eval_options(models: list[Model], preset: Preset) -> str:
    """Write the evaluation's options where they are not the preset's."""
    result = next((model.result for model in models if model.result), None)
    if result is None:
        return ""
    tasks = "".join(f" --task {task}" for task in result.tasks) if tuple(result.tasks) != preset.eval.tasks else ""
    limit = f" --limit {result.limit}" if result.limit != preset.eval.limit and result.limit is not None else ""
    written = next((score.answers for score in result.tasks.values() if score.answers), None)
    samples = f" --samples {written.samples}" if written and written.samples != preset.eval.samples else ""
    if written and written.temperature is not None and written.temperature != preset.eval.temperature:
        samples += f" --temperature {written.temperature:g}"
    return tasks + limit + samples


def _compare(own: Sequence[Model], preset: Preset) -> str:
    """Write the command of a comparison, with all that is not as it is by default."""
    plain = Preset(teacher=TeacherSection(model=preset.teacher.model))
    others = [model.result.reference or model.key for model in own if model.kind == "foreign" and model.result]
    changed = {
        f"{section}.{key}": value
        for section in ("teacher", "prompts", "heldout")
        for key, value in preset.model_dump(mode="json")[section].items()
        if value != plain.model_dump(mode="json")[section][key]
    }
    sets = "".join(f" --set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in changed.items())
    layers = " --by-layer" if any(model.result and model.result.layers for model in own) else ""
    names = " ".join(shlex.quote(one) for one in (preset.teacher.model, *others))
    return f"kdctl compare {names}{_eval_options(list(own), plain)}{layers}{sets} --run {NEW}"


def _foreign(model: Model) -> str:
    reference = model.result.reference if model.result else None
    return f"kdctl eval --run {NEW} ptq --also {shlex.quote(reference or Path(model.key).name)} --as {model.key}"
