"""Every number that says how good a model is, per token, item or whole document, declared once.

Columns on disk, tables, views, model cards, the metrics of sweeps and the report follow from the tables at the end; a
new measure is one more entry. Nothing here imports torch: functions call methods of the tensors that they are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, log
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Better = Literal["lower", "higher"]
Unit = Literal["nats", "share", "perplexity"]
ScoreUnit = Literal["points", "probability"]
LONGEST = 1e7
"""From here on a number is written as a power of ten: perplexities have no bound."""


def fixed(value: float, digits: int, sign: str = "-") -> str:
    """Write a number with so many digits after the point, or as a power of ten where that is long or only zeros.

    sign: "+" where positive numbers have one too.
    """
    if abs(value) >= LONGEST:
        return f"{value:{sign}.3g}"
    text = f"{value:{sign}.{digits}f}"
    return f"{value:{sign}.1e}".replace("e-0", "e-") if value and float(text) == 0 else text


class Predictions:
    """What teacher (p) and student (q) predict at N positions; each tensor is computed when it is first asked for.

    teacher, student: return natural-log probabilities over the vocabulary, (N, V) float32; no teacher: the student is
    the teacher. target: the tokens that were written, (N,).
    """

    def __init__(self, student: "Callable[[], Tensor]", teacher: "Callable[[], Tensor] | None", target: "Tensor"):
        self._student, self._teacher, self.target = student, teacher, target

    @cached_property
    def log_q(self) -> "Tensor":
        """Log-probabilities of the student, (N, V)."""
        return self._student()

    @cached_property
    def log_p(self) -> "Tensor":
        """Log-probabilities of the teacher, (N, V)."""
        return self.log_q if self._teacher is None else self._teacher()

    @cached_property
    def difference(self) -> "Tensor":
        """Return log p − log q, (N, V)."""
        return self.log_p - self.log_q

    def of_target(self, logs: "Tensor") -> "Tensor":
        """Return the log-probability of the token that was written, (N,)."""
        return logs.gather(-1, self.target.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Choices:
    """What a model said of one multiple-choice question.

    loglikelihoods: of each choice, nats. lengths: of each choice, characters. gold: number of the right choice.
    """

    loglikelihoods: Sequence[float]
    lengths: Sequence[int]
    gold: int

    @property
    def best(self) -> int:
        """The likeliest choice, the first of several."""
        return _largest(self.loglikelihoods)

    @property
    def right(self) -> float:
        """The share of the right choice in the likelihoods of all; 0 where no choice is right."""
        if self.gold < 0:
            return 0.0
        most = max(self.loglikelihoods)
        shares = [exp(value - most) for value in self.loglikelihoods]
        return shares[self.gold] / sum(shares)

    @property
    def best_norm(self) -> int:
        """The likeliest choice per character."""
        return _largest([value / length for value, length in zip(self.loglikelihoods, self.lengths, strict=True)])


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


@dataclass(frozen=True)
class Measure:
    """A number by which models are compared. name: in records, metrics and tables. label: what people read."""

    name: str
    label: str
    better: Better


@dataclass(frozen=True)
class TokenMeasure(Measure):
    """A number of each position of held-out text; a model has the mean over all tokens.

    per_token: returns (N,) float32. column: where a document's sum over its tokens stands in ``heldout.parquet``.
    """

    unit: Unit
    per_token: "Callable[[Predictions], Tensor]"
    column: str
    of: Literal["pair", "student", "teacher"] = "pair"
    """Whose predictions it reads. Those of a pair are followed during training, and say nothing of the teacher."""
    exponent: str = ""
    """Where the number is exp of the mean per token: what that mean is called."""
    heading: str = ""
    """Over a column of a table that compares models; without one it has no column."""
    ranked: bool = True
    """Tell whether models are ranked by it in a report."""


@dataclass(frozen=True)
class ItemMeasure(Measure):
    """A number in [0, 1] of each benchmark item; a model has the mean over a task's items.

    It is computed from the log-likelihoods that ``samples/<task>.parquet`` keeps, so also for models evaluated before.
    """

    per_item: Callable[[Choices], float]
    binary: bool = False
    """Right (1) or wrong (0): compared by score intervals and McNemar's test, others by clustered t intervals."""
    reported: bool = False
    """lm-eval reports it for the tasks that have it; the last one that a task has is its headline."""
    heading: str = ""
    """Over a column of the report, for measures beside the headline."""
    unit: ScoreUnit = "points"
    """What a difference is said in."""


@dataclass(frozen=True)
class RollingMeasure(Measure):
    """A number of the documents of a task that scores whole ones, as lm-eval reports it.

    It is a function of −Σ log-likelihood / Σ size over documents. size: the column of ``samples/<task>.parquet`` that a
    document is counted in. of_nats: makes the number of the nats that one byte or word costs.
    """

    size: Literal["bytes", "words"]
    of_nats: Callable[[float], float]


FORWARD_KL = TokenMeasure(
    name="forward_kl",
    label="KL(teacher‖student) per token",
    better="lower",
    unit="nats",
    per_token=lambda at: (at.log_p.exp() * at.difference).sum(-1),
    column="forward_kl",
    heading="KL to teacher",
)
REVERSE_KL = TokenMeasure(
    name="reverse_kl",
    label="KL(student‖teacher) per token",
    better="lower",
    unit="nats",
    per_token=lambda at: -(at.log_q.exp() * at.difference).sum(-1),
    column="reverse_kl",
)
AGREEMENT = TokenMeasure(
    name="top1_agreement",
    label="top-1 agreement",
    better="higher",
    unit="share",
    per_token=lambda at: (at.log_p.argmax(-1) == at.log_q.argmax(-1)).float(),
    column="agree",
    heading="top-1",
    ranked=False,
)
PERPLEXITY = TokenMeasure(
    name="perplexity",
    label="held-out perplexity",
    better="lower",
    unit="perplexity",
    per_token=lambda at: -at.of_target(at.log_q),
    column="nll",
    of="student",
    exponent="−log likelihood",
    heading="perplexity",
)
TEACHER_PERPLEXITY = TokenMeasure(
    name="teacher_perplexity",
    label="the teacher's held-out perplexity",
    better="lower",
    unit="perplexity",
    per_token=lambda at: -at.of_target(at.log_p),
    column="teacher_nll",
    of="teacher",
    exponent="the teacher's −log likelihood",
)
ACCURACY = ItemMeasure(
    name="acc",
    label="accuracy",
    better="higher",
    per_item=lambda said: float(said.best == said.gold),
    binary=True,
    reported=True,
)
NORMALIZED_ACCURACY = ItemMeasure(
    name="acc_norm",
    label="accuracy by likelihood per character",
    better="higher",
    per_item=lambda said: float(said.best_norm == said.gold),
    binary=True,
    reported=True,
)
P_RIGHT = ItemMeasure(
    name="p_right",
    label="probability of the right choice among all of them",
    better="higher",
    per_item=lambda said: said.right,
    heading="P(right)",
    unit="probability",
)
"""Moves with every change of a likelihood, accuracy only where a choice overtakes another; it is another quantity."""

BITS_PER_BYTE = RollingMeasure(
    name="bits_per_byte", label="bits per byte", better="lower", size="bytes", of_nats=lambda nats: nats / log(2)
)
BYTE_PERPLEXITY = RollingMeasure(
    name="byte_perplexity", label="perplexity per byte", better="lower", size="bytes", of_nats=exp
)
WORD_PERPLEXITY = RollingMeasure(
    name="word_perplexity", label="perplexity per word", better="lower", size="words", of_nats=exp
)

TOKEN_MEASURES = {
    one.name: one for one in (FORWARD_KL, REVERSE_KL, AGREEMENT, PERPLEXITY, TEACHER_PERPLEXITY)
}  # in the order of the columns of heldout.parquet
ITEM_MEASURES = {one.name: one for one in (ACCURACY, NORMALIZED_ACCURACY, P_RIGHT)}
ROLLING_MEASURES = {one.name: one for one in (BITS_PER_BYTE, BYTE_PERPLEXITY, WORD_PERPLEXITY)}


def pair_measures() -> list[TokenMeasure]:
    """List what compares a student with its teacher: what is followed during training and swept for."""
    return [one for one in TOKEN_MEASURES.values() if one.of == "pair"]


def column_measures() -> list[TokenMeasure]:
    """List what has a column where models stand side by side."""
    return [one for one in TOKEN_MEASURES.values() if one.heading]


def derived_measures() -> list[ItemMeasure]:
    """List what is computed of items beside what lm-eval reports."""
    return [one for one in ITEM_MEASURES.values() if not one.reported]


def reported_measures() -> list[ItemMeasure]:
    """List what lm-eval reports of items, a task's headline last."""
    return [one for one in ITEM_MEASURES.values() if one.reported]
