"""Which documents of a task a student answers, where the teacher's own answers tell which may differ.

A student close to its teacher changes an answer only where the teacher's two likeliest choices are nearly alike. All
documents of small margin are asked, and a random share of the others, each of which counts for several: the estimate of
every difference stays unbiased whatever the margins say (Horvitz & Thompson 1952), and its interval holds what was not
asked. What a document that was not asked counts for is the teacher's answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kdctl.base.rng import uniform
from kdctl.config.preset import EvalSection
from kdctl.run.documents import TEACHERS, WEIGHT, Array
from kdctl.run.measures import NORMALIZED_ACCURACY

Known = dict[tuple[int, int], float]
"""Log-likelihoods of choices by document and number of the choice."""


@dataclass(frozen=True)
class Allocation:
    """A task's documents, in the order of its table.

    weights: (documents,), 0 where a document is not asked, else how many it counts for. said: what the teacher's
    log-likelihoods of its choices are.
    """

    weights: Array
    said: Sequence[Sequence[float]]

    @property
    def asked(self) -> int:
        """Documents that are asked."""
        return int((self.weights > 0).sum())

    def known(self, first: int, count: int) -> Known:
        """Return what needs no asking of ``count`` documents from ``first`` on, by their numbers from 0."""
        return {
            (number, choice): value
            for number in range(count)
            if not self.weights[first + number]
            for choice, value in enumerate(self.said[first + number])
        }

    def noted(self, table: pa.Table) -> pa.Table:
        """Add to a student's table what each document counts for, and the teacher's likelihoods."""
        said = pa.array(self.said, pa.list_(pa.float64()))
        return table.append_column(WEIGHT, pa.array(self.weights)).append_column(TEACHERS, said)


def allocate(table: pa.Table, metric: str, settings: EvalSection) -> Allocation | None:
    """Choose documents by the teacher's margins in its table of a task; None where it is no multiple choice.

    metric: the task's headline, by which margins are taken.
    """
    if "loglikelihoods" not in table.column_names:
        return None
    said, lengths = table["loglikelihoods"].to_pylist(), table["lengths"].to_pylist()
    count, normalized = len(said), metric == NORMALIZED_ACCURACY.name
    margins = [_margin(one, size if normalized else None) for one, size in zip(said, lengths, strict=True)]
    near = math.ceil(settings.near * count)
    order = np.argsort(margins, kind="stable")
    far = order[near:].tolist()
    keys = [uniform("allocation", settings.seed, name) for name in table["item_id"].to_pylist()]
    drawn = sorted(far, key=lambda number: (keys[number], number))[: math.ceil(settings.far * len(far))]
    weights = np.zeros(count)
    weights[order[:near]] = 1.0
    weights[drawn] = len(far) / max(1, len(drawn))
    return Allocation(weights, said)


def _margin(said: Sequence[float], lengths: Sequence[int] | None) -> float:
    """Return how much likelier the likeliest choice is than the next, nats; per character where lengths are given."""
    scores = sorted(one / size for one, size in zip(said, lengths or [1] * len(said), strict=True))
    return scores[-1] - scores[-2] if len(scores) > 1 else math.inf
