"""Run folders to a ``Study``."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from kdctl.base.errors import DataError, StoreError
from kdctl.config.preset import DistillSection, Preset
from kdctl.config.resolve import canonical
from kdctl.report.study import (
    Kind,
    Model,
    Score,
    Settings,
    Source,
    Study,
    differences,
    require_comparable,
    student_folder,
)
from kdctl.run.measures import ROLLING_MEASURES
from kdctl.run.paths import RunDir, VariantDir
from kdctl.run.record_files import first_problem, read_record
from kdctl.run.records import DistillReport, EvalResult, MethodResult, QuantizeReport, StoreManifest, StudentFolder
from kdctl.run.tracking import read_metrics

LOSSES = ("train/forward_kl", "train/reverse_kl", "train/jsd")
LAST_SHARE = 10
KINDS: tuple[Kind, ...] = ("teacher", "ptq", "foreign", "variant")
NAMED = {"lmbda", "beta", "lr", "steps", "train", "seed", "micro_batch_size", "gradient_accumulation", "lora_rank"}
BOOKKEEPING = {"heldout_every", "heldout_documents", "checkpoint_every", "keep_last"}


def read_study(folders: Sequence[Path | RunDir]) -> Study:
    """Read run folders into one study.

    Raises StoreError for a folder without results or with a damaged one, and DataError, with the list of differences,
    where models were not asked the same questions.
    """
    runs = [folder if isinstance(folder, RunDir) else RunDir(folder) for folder in folders]
    sources = tuple(map(_source, runs, _folder_names(runs)))
    models = [model for source in sources for model in _models(source)]
    joined = _with_unique_names(_merged(models))
    study = Study(tuple(sorted(joined, key=lambda model: KINDS.index(model.kind))), sources)
    require_comparable(study)
    return study


def _folder_names(runs: Sequence[RunDir]) -> list[str]:
    """Name folders by their last part, or in full where two end alike."""
    paths = [run.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise DataError(f"{path} is named twice; a report joins different run folders, so name it once")
    names = [path.name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _source(run: RunDir, name: str) -> Source:
    preset = read_record(run.preset, Preset) if run.preset.exists() else None
    compared = sorted((run.path / "compare").glob("*.json"))
    return Source(name, run, preset, tuple(read_record(path, MethodResult) for path in compared))


def _models(source: Source) -> list[Model]:
    """Read every model of a folder. Raises StoreError if there is none."""
    run = source.run
    variants = [variant.name for variant in run.variants()]
    results = {path.parent.name: read_record(path, EvalResult) for path in run.evaluated()}
    foreign = [name for name, result in results.items() if result.reference is not None and name not in variants]
    named: dict[Kind, list[str]] = {"teacher": ["teacher"], "ptq": ["ptq"], "foreign": foreign, "variant": variants}
    found = [_model(source, name, kind, results.get(name)) for kind, names in named.items() for name in names]
    models = [model for model in found if model.result or model.quantized]
    if not models:
        found = "has no results yet" if run.path.is_dir() else "is no run folder"
        raise StoreError(f"{run.path} {found}; run kdctl quantize, distill or eval with --run {run.path} first")
    return models


def _model(source: Source, name: str, kind: Kind, result: EvalResult | None) -> Model:
    run = source.run
    quantized = distilled = None
    if kind in ("ptq", "variant") and (path := student_folder(run, name) / "quantize.json").exists():
        quantized = read_record(path, QuantizeReport)
    if kind == "variant":
        distilled = read_record(run.variant(name).report, DistillReport)
    scores = {task: Score(one.value, one.stderr, one.items) for task, one in result.tasks.items()} if result else {}
    rolling = {task for task in scores if result and result.tasks[task].metric in ROLLING_MEASURES}
    return Model(
        name=name,
        kind=kind,
        settings=_settings(run, distilled, quantized, source.preset.prompts.shares if source.preset else None),
        scores={task: score for task, score in scores.items() if task not in rolling},
        rolling={task: score for task, score in scores.items() if task in rolling},
        folders=(source.name,),
        run=run,
        key=name,
        result=result,
        quantized=quantized,
        distilled=distilled,
        train_loss=_train_loss(run.variant(name), distilled) if distilled else None,
    )


def _settings(
    run: RunDir, distilled: DistillReport | None, quantized: QuantizeReport | None, shares: str | None
) -> Settings:
    """Put together what made a model. shares: how the folder's preset weighs several sources of prompts."""
    folder = distilled or quantized
    made = Settings(method=folder.method, grid=_grid(folder)) if folder else Settings()
    if distilled is None:
        return made
    section = distill_section(run.variant(distilled.variant).report, distilled)
    rest = section.model_dump(mode="json", exclude=NAMED | BOOKKEEPING)
    return dataclasses.replace(
        made,
        lmbda=section.lmbda,
        beta=section.beta,
        lr=section.lr,
        steps=section.steps,
        batch_size=section.rows_per_step,
        max_new_tokens=_rollout_length(run, distilled, section),
        train=section.learns,
        rank=section.lora_rank if section.train == "lora" else None,
        seed=section.seed,
        mix=distilled.mix or shares,
        rest=canonical(rest),
    )


def distill_section(path: Path, report: DistillReport) -> DistillSection:
    """Return a variant's settings. Raises StoreError if another version of kdctl wrote them."""
    try:
        return DistillSection.model_validate(report.settings)
    except ValidationError as error:
        raise StoreError(
            f"{path} is of another kdctl version, its settings do not fit: {first_problem(error)}"
        ) from None


def _grid(folder: StudentFolder) -> str:
    kind = "symmetric" if folder.symmetric else "asymmetric"
    return f"{folder.bits} bits, group size {folder.group_size}, {kind}"


def _rollout_length(run: RunDir, distilled: DistillReport, section: DistillSection) -> int | None:
    """Read how long the student's rollouts could get; None without any, or where their store is gone."""
    if section.lmbda == 0:
        return None
    store = run.variant(section.replay or distilled.variant).rollouts if section.live or section.replay else None
    path = (store or run.rollouts("student", distilled.mix)) / "manifest.json"
    sampling = read_record(path, StoreManifest).sampling if path.exists() else None
    return sampling.max_new_tokens if sampling else None


def _train_loss(variant: VariantDir, report: DistillReport) -> float:
    """Average the loss over the last tenth of the steps; one step's depends on its few sequences."""
    losses = [line[name] for line in read_metrics(variant.metrics, report.metrics) for name in LOSSES if name in line]
    return statistics.fmean(losses[-max(1, len(losses) // LAST_SHARE) :]) if losses else report.final_loss


def _weights(model: Model) -> str:
    return model.result.weights if model.result else ""


def _merged(models: Sequence[Model]) -> list[Model]:
    """Keep one of the teachers and PTQ students that joined folders share to the bit."""
    kept: dict[object, Model] = {}
    for model in models:
        shared = model.kind in ("teacher", "ptq") and _weights(model)
        key = (model.kind, _weights(model)) if shared else (model.folders, model.name)
        first = kept.get(key)
        if first is not None and not differences(first, model):
            model = dataclasses.replace(first, folders=first.folders + model.folders)
        elif first is not None:
            key = (model.folders, model.name)
        kept[key] = model
    return list(kept.values())


def _with_unique_names(models: Sequence[Model]) -> list[Model]:
    """Put the folder before names that two models have."""
    names = [model.name for model in models]
    return [
        dataclasses.replace(one, name=f"{one.folders[0]}/{one.name}") if names.count(one.name) > 1 else one
        for one in models
    ]
