"""Which values each trial gets, and how it went: Optuna draws them and keeps the state in a journal file."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from kdctl.base.rng import digest
from kdctl.sweep.journal_file import JournalFile
from kdctl.sweep.space import Choice, Interval, Parameter, Sweep

Values = dict[str, Any]
SLOT = "slot"


def distribution(parameter: Parameter) -> BaseDistribution:
    """Describe a parameter to Optuna. Choices are JSON texts, because Optuna stores only scalars.

    Raises ValueError for a parameter that only wandb draws.
    """
    if isinstance(parameter, Choice):
        return CategoricalDistribution([json.dumps(value) for value in parameter.values])
    if not isinstance(parameter, Interval):
        raise ValueError(parameter.reason)
    low, high = parameter.low, parameter.high
    if parameter.step == 1 and isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high)
    return FloatDistribution(low, high, step=parameter.step, log=parameter.logarithmic)


def distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    """Describe all swept parameters to Optuna."""
    return {parameter.key: distribution(parameter) for parameter in sweep.parameters}


def decoded(sweep: Sweep, drawn: Values) -> Values:
    """Turn what Optuna drew into values; numbers get six digits, so that a variant's name says exactly what it is."""
    parameters = {parameter.key: parameter for parameter in sweep.parameters}
    return {key: _decoded(parameters[key], value) for key, value in drawn.items()}


def _decoded(parameter: Parameter, drawn: Any) -> Any:
    if isinstance(parameter, Choice):
        return json.loads(drawn)
    if isinstance(drawn, int) or not isinstance(parameter, Interval):
        return drawn
    return min(max(float(f"{drawn:.6g}"), parameter.low), parameter.high)


def grid(sweep: Sweep) -> Iterator[Values]:
    """Walk the grid, the last parameter fastest."""
    axes = [_axis(parameter) for parameter in sweep.parameters]
    for point in itertools.product(*axes):
        yield dict(zip((parameter.key for parameter in sweep.parameters), point, strict=True))


def _axis(parameter: Parameter) -> tuple[Any, ...] | range:
    """List a parameter's values for a grid. Raises ValueError for a continuum."""
    if isinstance(parameter, Choice):
        return parameter.values
    found = distribution(parameter)
    if isinstance(found, IntDistribution):
        return range(found.low, found.high + 1)
    raise ValueError(f"{parameter.key} has no list of values, which method: grid needs; use random or bayes")


def random_values(sweep: Sweep, slot: int) -> Values:
    """Draw the values of one random trial: the same ones in every process and after every restart."""
    _hush()
    study = optuna.create_study(sampler=RandomSampler(seed=_seed(slot)))
    return decoded(sweep, study.ask(distributions(sweep)).params)


def _seed(slot: int) -> int:
    return digest("sweep", slot) % 2**32


def _hush() -> None:
    """Keep Optuna's running commentary out of the terminal."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class Journal:
    """The state of one sweep in one run folder; any number of processes may hold it open at once.

    A slot is a place in the sweep, 0 to total − 1. What a slot's trial got is decided once and then read from the file.
    """

    def __init__(self, path: Path, name: str, sweep: Sweep):
        _hush()
        self.sweep = sweep
        self._storage = JournalStorage(JournalFile(path))
        self._name = name
        self._optuna = optuna.create_study(
            study_name=name, storage=self._storage, direction=sweep.metric.goal, load_if_exists=True
        )

    def trials(self) -> dict[int, FrozenTrial]:
        """Return the last trial of each slot."""
        return {trial.user_attrs[SLOT]: trial for trial in self._optuna.get_trials(deepcopy=False) if _has_slot(trial)}

    def begin(self, slot: int, values: Values | None) -> FrozenTrial:
        """Return a slot's trial: the one that is there unless it failed, else a new one, with ``values`` or TPE's."""
        found = self.trials().get(slot)
        if found is not None and found.state != TrialState.FAIL:
            return found
        if found is not None:
            self._add(slot, found.params)
        elif values is not None:
            self._add(slot, self._encoded(values))
        else:
            chooser = optuna.load_study(study_name=self._name, storage=self._storage, sampler=_tpe(slot))
            chooser.ask(distributions(self.sweep)).set_user_attr(SLOT, slot)
        return self.trials()[slot]

    def _add(self, slot: int, params: Values) -> None:
        """Enter a trial whose values are known."""
        spaces = distributions(self.sweep)
        new = create_trial(params=params, distributions=spaces, user_attrs={SLOT: slot}, state=TrialState.RUNNING)
        self._optuna.add_trial(new)

    def _encoded(self, values: Values) -> Values:
        choices = {parameter.key for parameter in self.sweep.parameters if isinstance(parameter, Choice)}
        return {key: json.dumps(value) if key in choices else value for key, value in values.items()}

    def values(self, trial: FrozenTrial) -> Values:
        """Return what a trial was given."""
        return decoded(self.sweep, trial.params)

    def reached(self) -> bool:
        """Tell whether a finished trial is as good as the metric's target; without one, none is."""
        metric = self.sweep.metric
        if metric.target is None:
            return False
        done = [trial.value for trial in self.trials().values() if trial.state == TrialState.COMPLETE]
        return any(metric.sign * value <= metric.sign * metric.target for value in done if value is not None)

    def falls_behind(self, trial: FrozenTrial, iteration: int, value: float) -> bool:
        """Enter a value from the middle of a trial and tell whether ``early_terminate`` stops it there.

        iteration: how many values the trial has given, this one included. Successive halving without waiting, which
        is what wandb calls hyperband (Li et al. 2018, arXiv:1810.05934): at min_iter · eta^k the best 1/eta go on.
        """
        early = self.sweep.file.early_terminate
        if early is None or early.min_iter is None or trial.state.is_finished():
            return False
        self._storage.set_trial_intermediate_value(trial._trial_id, iteration, value)
        pruner = SuccessiveHalvingPruner(min_resource=early.min_iter, reduction_factor=early.eta)
        return pruner.prune(self._optuna, self._storage.get_trial(trial._trial_id))

    def stopped(self, trial: FrozenTrial) -> bool:
        """Tell whether a trial fell behind and was stopped."""
        return trial.state == TrialState.PRUNED

    def stop(self, trial: FrozenTrial) -> None:
        """Enter that a trial fell behind; repeating the sweep does not take it up again."""
        self._optuna.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)

    def finish(self, trial: FrozenTrial, value: float) -> None:
        """Enter a trial's result, unless it is there already."""
        self._optuna.tell(trial.number, value, skip_if_finished=True)

    def fail(self, trial: FrozenTrial) -> None:
        """Enter that a trial ended without a result; repeating the sweep tries it again."""
        self._optuna.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _has_slot(trial: FrozenTrial) -> bool:
    """Tell whether a trial is one of ours: a kill between asking and labelling leaves one that nothing was done for."""
    return SLOT in trial.user_attrs


def _tpe(slot: int) -> BaseSampler:
    """Make Optuna's Bayesian sampler; trials that still run count as bad ones, so that shards spread out."""
    return TPESampler(seed=_seed(slot), constant_liar=True)
