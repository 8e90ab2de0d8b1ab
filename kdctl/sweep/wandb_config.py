"""A sweep file to what wandb's server and agents are given (wandb itself is not imported)."""

from collections.abc import Sequence
from typing import Any

from kdctl.sweep.plan import MAX_TRIALS, SweepPlan, check_logged
from kdctl.sweep.space import Sweep, field_of, flat

PROGRAM = "kdctl"


def wandb_config(plan: SweepPlan, words: Sequence[str], max_trials: int | None) -> dict[str, Any]:
    """Return the sweep with the command that an agent runs for each trial: ``kdctl`` and its ``words``, then values.

    Nested parameters get their dotted names, because agents pass a nested one as a single argument. Raises PresetError
    if training never logs the metric.
    """
    sweep = plan.sweep
    check_logged(plan, "wandb")
    config = sweep.file.model_dump(mode="json", exclude_unset=True)
    config["parameters"] = _parameters(sweep)
    config["metric"] = sweep.metric.model_dump(exclude_none=True)
    config["program"] = PROGRAM
    config["command"] = ["${env}", "${interpreter}", "-P", "-m", "${program}", *words, "${args_no_hyphens}"]
    config.setdefault("name", sweep.name)
    if sweep.method != "grid":
        config["run_cap"] = max_trials or sweep.file.run_cap or MAX_TRIALS
    return config


def _parameters(sweep: Sweep) -> dict[str, Any]:
    return {
        field_of(name, sweep.origin): entry.model_dump(mode="json", exclude_unset=True)
        for name, entry in flat(sweep.file.parameters)
    }
