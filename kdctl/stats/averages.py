"""Averages of several measures over several tasks, whose items may be shared or come in common groups.

Tasks are fixed, their items are samples. Two tasks covary through the groups that both have items in, and only so.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdctl.base.errors import DataError
from kdctl.stats import bootstrap
from kdctl.stats.groups import Array, Index, Labels, influences


@dataclass(frozen=True)
class Task:
    """One task's part of an average."""

    columns: Array
    """(C, items): C measures of each item."""
    groups: Index
    """(items,): numbers of the items' groups, common to all tasks of the average."""
    weight: float


def number_tasks(labels: Mapping[str, tuple[int, Labels | None]]) -> dict[str, Index]:
    """Number the groups of all tasks together, from each task's count of items and their labels.

    Equal labels in two tasks are one group; items without labels are groups of their own.
    """
    seen: dict[Hashable, int] = {}
    numbered = {}
    for name, (items, own) in labels.items():
        keys = [(name, item) for item in range(items)] if own is None else [(label,) for label in own]
        numbered[name] = np.array([seen.setdefault(key, len(seen)) for key in keys], np.int64)
    return numbered


def resolve_weights(tasks: Sequence[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return the weight of each task, equal ones by default.

    Raises DataError on no task, on weights of other tasks, on negative ones and on ones that do not sum to 1.
    """
    chosen = dict.fromkeys(tasks, 1 / max(len(tasks), 1)) if weights is None else dict(weights)
    if not tasks or set(chosen) != set(tasks) or not np.isclose(sum(chosen.values()), 1) or min(chosen.values()) < 0:
        raise DataError(
            f"The tasks {sorted(tasks)} came with the weights {chosen}. An average needs at least one task and, for "
            "each of them and no other, a weight of at least 0, together 1. Leave the weights out to weigh all equally."
        )
    return chosen


def _count(tasks: Sequence[Task]) -> int:
    return 1 + max(int(task.groups.max()) for task in tasks)


def averages(tasks: Sequence[Task]) -> Array:
    """Return the weighted averages of the tasks' means, (C,)."""
    return np.sum([task.weight * task.columns.mean(1) for task in tasks], axis=0)


def covariance(tasks: Sequence[Task]) -> Array:
    """Estimate the covariance of the averages, (C, C); ∞ where a task has one group only.

    As ``groups.covariance`` within a task, with the tasks' own G/(G−1); a group in two tasks adds its products of both.
    """
    total = np.zeros((len(tasks[0].columns), _count(tasks)))
    for task in tasks:
        groups = len(np.unique(task.groups))
        if groups == 1:
            return np.full((len(total), len(total)), np.inf)
        table = np.stack([influences(column, task.groups, total.shape[1]) for column in task.columns])
        total += task.weight * np.sqrt(groups / (groups - 1)) * table
    return total @ total.T


def correlation(tasks: Sequence[Task]) -> Array:
    """Correlate the errors of the tasks' means of the first measure, (K, K): 0 where two tasks share no group.

    Where one has the same value everywhere the correlation is unknown, and taken as 1 if they do share a group.
    """
    table = np.stack([influences(task.columns[0], task.groups, _count(tasks)) for task in tasks])
    present = np.stack([np.bincount(task.groups, minlength=_count(tasks)) > 0 for task in tasks])
    norm = np.sqrt(np.square(table).sum(1))
    unit = table / np.where(norm > 0, norm, 1)[:, None]
    unknown = (np.outer(norm, norm) == 0) & (present @ present.T)
    return np.where((np.eye(len(tasks)) > 0) | unknown, 1.0, unit @ unit.T)


def resample(tasks: Sequence[Task]) -> Array:
    """Bootstrap the averages over groups, (C, RESAMPLES).

    Groups are drawn in strata of those that belong to the same tasks, so that each task keeps its size and a shared
    group is drawn for all its tasks at once.
    """
    count, measures = _count(tasks), len(tasks[0].columns)
    sizes = np.stack([np.bincount(task.groups, minlength=count) for task in tasks])  # (K, groups)
    sums = np.stack([[np.bincount(task.groups, column, count) for column in task.columns] for task in tasks])
    patterns, stratum = np.unique(sizes > 0, axis=1, return_inverse=True)
    totals = np.zeros((len(tasks), measures + 1, bootstrap.RESAMPLES))
    for number, pattern in enumerate(patterns.T):
        members = stratum.ravel() == number
        table = np.concatenate([sums, sizes[:, None]], axis=1)[pattern][:, :, members].astype(np.float64)
        drawn = bootstrap.resampled_counts(table.reshape(-1, table.shape[-1]), "stratum", str(number))
        totals[pattern] += drawn.reshape(*table.shape[:2], -1)
    weights = np.array([task.weight for task in tasks])
    return np.einsum("k,kcr->cr", weights, totals[:, :-1] / totals[:, -1:])
