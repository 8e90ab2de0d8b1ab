"""What a sweep will do, checked in full before the first trial (no torch)."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kdctl.base.errors import PresetError
from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset, identity, load_preset, parse_value, variant_name
from kdctl.run.measures import ITEM_MEASURES, ROLLING_MEASURES, pair_measures
from kdctl.sweep.journal import Values, grid, random_values
from kdctl.sweep.space import PRESET, Choice, Foreign, Parameter, Sweep, field_of

MAX_TRIALS = 64
MIX = "prompts.mix"
MOST_TRIALS = 10_000
"""More cannot be asked for: all are laid out and checked before the first one runs."""
CORNERS = 4096


@dataclass(frozen=True)
class Shard:
    """One of ``count`` processes that divide a sweep: it does slots index, index + count, ..."""

    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        """Return the shard's name; the whole sweep has none."""
        return f"{self.index}-of-{self.count}" if self.count > 1 else ""

    def slots(self, total: int) -> range:
        """Return the slots of this shard."""
        return range(self.index, total, self.count)


def parse_shard(text: str) -> Shard:
    """Read ``i/N``. Raises PresetError if it is not that, or if i is not among 0 to N − 1."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise PresetError(f"--shard {text!r} is not of the form i/N, for example 0/4")
    index, count = int(found[1]), int(found[2])
    if index >= count:
        raise PresetError(f"--shard {text}: there are {count} shards, numbered from 0; {index} is not one of them")
    return Shard(index, count)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, the preset that every trial starts from, and how many trials there are.

    trials: their values, in order; empty where each is chosen after seeing earlier ones (bayes) or by wandb.
    """

    sweep: Sweep
    preset: Preset
    total: int
    trials: tuple[Values, ...] = ()
    evaluate: bool = True

    def trial_preset(self, values: Mapping[str, Any]) -> Preset:
        """Put a trial's values into the preset. Raises PresetError if they do not go together."""
        return build_preset(self.preset.model_dump(mode="json"), values, f"of trial {describe(values)}")

    def variant(self, values: Mapping[str, Any], base: Preset) -> str:
        """Name a trial's variant in a folder whose preset is ``base``; rollout fields that differ count too."""
        preset = self.trial_preset(values)
        name = variant_name(preset, base)
        ours, theirs = preset.rollout.model_dump(), base.rollout.model_dump()
        name += "".join(f"_{key}{value}" for key, value in ours.items() if value != theirs[key])
        return re.sub(r"[^\w.=+-]+", "-", name)

    def values(self, slot: int) -> Values | None:
        """Return a slot's values, None where Optuna chooses them later."""
        return self.trials[slot] if self.trials else None

    @property
    def identity(self) -> str:
        """Hash what decides the trials and their results; the number of trials does not."""
        space = self.sweep.file.model_dump(mode="json", include={"method", "parameters", "metric", "early_terminate"})
        preset = self.preset.model_dump(mode="json", exclude={"description", "tracking", "runtime"})
        for name in ("rollout", "prompts", "distill"):
            preset[name] = getattr(self.preset, name).decisive()
        return identity("sweep", {"preset": preset, "sweep": space}, {})


def describe(values: Mapping[str, Any]) -> str:
    """Write a trial's values with the fields' short names."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())


def plan_sweep(sweep: Sweep, preset: str, overrides: Values, max_trials: int | None, evaluate: bool) -> SweepPlan:
    """Lay out a sweep to be run by kdctl. ``preset`` is a name or path, ``overrides`` win over the file's settings.

    Raises PresetError for anything that would fail a trial or make trials incomparable.
    """
    for parameter in sweep.parameters:
        if isinstance(parameter, Foreign):
            raise PresetError(f"{parameter.reason}; with --backend wandb, wandb chooses the trials")
    base = base_plan(sweep, preset, overrides, evaluate)
    _check_stopping(base)
    if sweep.method == "grid":
        trials = grid_trials(sweep, max_trials)
        total = len(trials)
    else:
        total = _bounded(max_trials or sweep.file.run_cap or MAX_TRIALS)
        trials = [random_values(sweep, slot) for slot in range(total)] if sweep.method == "random" else []
    _check_trials(base, trials)
    if sweep.method == "grid":
        _check_distinct(base, trials)
    return SweepPlan(sweep, base.preset, total, tuple(trials), evaluate)


def parse_trial(sweep: Sweep, assignments: Iterable[str]) -> Values:
    """Read ``field=value`` texts, as a wandb agent writes them, to one trial's values.

    Raises PresetError unless every swept field has a value of the file's and nothing differs from its settings.
    """
    fixed = sweep.settings | ({PRESET: sweep.preset} if sweep.preset else {})
    swept = {parameter.key: parameter for parameter in sweep.parameters}
    values: Values = {}
    for text in assignments:
        name, separator, raw = text.partition("=")
        if not separator:
            raise PresetError(f"{text!r} is not of the form field=value")
        key = field_of(name, f"trial {text}")
        if key in swept:
            values[key] = _value_of(sweep, swept[key], text, raw)
        elif key not in fixed or raw != str(fixed[key]):
            sets = f" and sets it to {fixed[key]!r}" if key in fixed else ""
            raise PresetError(
                f"{text}: {sweep.origin} does not sweep {key}{sets}, only {', '.join(swept)}; leave it out "
                "(--set and --preset say what all trials share)"
            )
    if missing := swept.keys() - values:
        raise PresetError(f"{sweep.origin} also sweeps {', '.join(sorted(missing))}; a trial needs a value of each")
    return values


def _value_of(sweep: Sweep, parameter: Parameter, text: str, raw: str) -> Any:
    """Read one value of a trial. Raises PresetError for one that is no trial of the sweep."""
    if not isinstance(parameter, Choice):
        return parse_value(raw)
    declared = {str(value): value for value in parameter.values}
    value = declared[raw] if raw in declared else parse_value(raw)
    if value not in parameter.values:
        raise PresetError(
            f"{text}: {sweep.origin} sweeps {parameter.key} over {', '.join(declared)}, so this would be a trial of "
            "another sweep; give one of those, or add it to a sweep file of your own"
        )
    return value


def base_plan(sweep: Sweep, preset: str, overrides: Values, evaluate: bool) -> SweepPlan:
    """Resolve the preset that all trials share and check what can be without knowing them."""
    swept = {parameter.key for parameter in sweep.parameters}
    for key in overrides:
        if key in swept:
            raise PresetError(f"{key} is swept by {sweep.origin}, so it cannot be set for all trials; leave it out")
    plan = SweepPlan(sweep, load_preset(preset, {**sweep.settings, **overrides}), 0, (), evaluate)
    for key in swept:
        if key.partition(".")[0] not in ("distill", "rollout") and key != MIX:
            raise PresetError(
                f"{sweep.origin} sweeps {key}; trials of one run folder share teacher, quantized student, sources of "
                "prompts and yardstick, so only distill fields, prompts.mix and, for live generation, rollout fields "
                "can differ; give it one value, or run one sweep for each value with --set and another --run"
            )
    _check_metric(plan)
    _check_trials(plan, _corners(sweep))
    return plan


def _check_stopping(plan: SweepPlan) -> None:
    """Refuse rules for stopping trials that only wandb knows."""
    early = plan.sweep.file.early_terminate
    if early is None:
        return
    if early.min_iter is None or early.max_iter is not None or early.s is not None or early.strict:
        raise PresetError(
            f"{plan.sweep.origin}: early_terminate is known here with min_iter and eta only, not with max_iter, s or "
            "strict; the brackets are min_iter times powers of eta. Or let wandb stop runs with --backend wandb"
        )
    check_logged(plan, "early_terminate")


def check_logged(plan: SweepPlan, who: str) -> None:
    """Refuse a metric that ``who`` would wait for in vain, because it compares what training logs."""
    name, settings = plan.sweep.metric.name, plan.preset.distill
    offered = [f"eval/{measure.name}" for measure in pair_measures()]
    if name not in offered:
        raise PresetError(
            f"{who} compares what training logs, and {name} is measured after it; the metric can be "
            f"{', '.join(offered)}"
        )
    if not 0 < settings.heldout_every <= settings.steps:
        raise PresetError(
            f"distill.heldout_every={settings.heldout_every} with distill.steps={settings.steps} never logs {name}, "
            f"which {who} compares; set distill.heldout_every to at most the steps"
        )


def grid_trials(sweep: Sweep, max_trials: int | None) -> list[Values]:
    """List the grid's points. Raises PresetError if there are more than ``max_trials``, 64 without it."""
    limit = _bounded(max_trials or MAX_TRIALS)
    try:
        trials = list(itertools.islice(grid(sweep), sweep.file.run_cap))
    except ValueError as error:
        raise PresetError(f"{sweep.origin}: {error}") from None
    if len(trials) > limit:
        raise PresetError(
            f"the grid of {sweep.origin} has {len(trials)} trials and --max-trials is {limit}; raise it if you mean it"
        )
    return trials


def _corners(sweep: Sweep) -> Iterator[Values]:
    """Combine choices and bounds, the first few thousand of them."""
    known = [parameter for parameter in sweep.parameters if parameter.extremes()]
    points = itertools.product(*(parameter.extremes() for parameter in known))
    for point in itertools.islice(points, CORNERS):
        yield {parameter.key: value for parameter, value in zip(known, point, strict=True)}


def _bounded(trials: int) -> int:
    """Return a number of trials. Raises PresetError if they are too many to lay out."""
    if trials > MOST_TRIALS:
        raise PresetError(
            f"{trials} trials are asked for, and all are laid out and checked before the first one runs; ask for at "
            f"most {MOST_TRIALS} by --max-trials or run_cap"
        )
    return trials


def _check_trials(plan: SweepPlan, trials: Iterable[Values]) -> None:
    """Refuse values that no preset may have, and rollout settings that would need a store for each trial."""
    for values in trials:
        preset = plan.trial_preset(values)
        live_only = preset.distill.lmbda == 1 and preset.distill.live
        if preset.rollout != plan.preset.rollout and not live_only:
            raise PresetError(
                f"trial {describe(values)} has rollout settings of its own and lmbda={preset.distill.lmbda:g}, "
                f"refresh_every={preset.distill.refresh_every}, replay={preset.distill.replay}; the trials of a folder "
                "share its rollout stores, so sweep rollout fields with lmbda=1 and live generation only, or use "
                "another --run for each value"
            )


def _check_distinct(plan: SweepPlan, trials: Iterable[Values]) -> None:
    """Refuse a grid with a point twice, as 1 and 1.0 would make."""
    seen: dict[str, Values] = {}
    for values in trials:
        name = plan.variant(values, plan.preset)
        if name in seen:
            raise PresetError(
                f"trials {describe(seen[name])} and {describe(values)} are both variant {name}; leave one out"
            )
        seen[name] = values


def _check_metric(plan: SweepPlan) -> None:
    """Refuse a metric that no trial will have, and a goal of which the worst trial would be the best."""
    name, goal = plan.sweep.metric.name, plan.sweep.metric.goal
    tasks = plan.preset.eval.tasks if plan.evaluate else ()
    offered = {f"eval/{one.name}": one.better for one in pair_measures()}
    of_tasks = [*ITEM_MEASURES.values(), *ROLLING_MEASURES.values()]
    offered |= {f"eval/{task}/{one.name}": one.better for task in tasks for one in of_tasks}
    if name not in offered:
        raise PresetError(f"{plan.sweep.origin}: no trial will have metric {name!r}; there are {', '.join(offered)}")
    wanted, which = ("minimize", "less") if offered[name] == "lower" else ("maximize", "more")
    if goal != wanted:
        raise PresetError(
            f"{plan.sweep.origin}: the goal is to {goal} {name}, and {which} of it is better; set goal: {wanted}"
        )
