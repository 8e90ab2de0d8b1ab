"""What to look out for during training: held-out KL without a new low, longer completions, vanishing ends.

Everything here is a function of the lines of metrics.jsonl, so a resumed run decides what an undisturbed one decides.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kdctl.base.errors import StoreError
from kdctl.config.preset import DistillSection
from kdctl.run.measures import fixed
from kdctl.run.records import Rollout, StopReason

WINDOW = 64
"""Completions whose mean is held against that of the first as many."""
GROWTH = 1.5
"""Warn when completions are this many times as long as at first."""
ENDS_LEFT = 0.5
"""Warn when the share of completions that end by themselves falls below this share of what it was at first."""
HELDOUT_KL = "eval/forward_kl"
Line = Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """How training ended. steps: those done; kept_step: the one whose student is kept."""

    steps: int
    kept_step: int
    stopped: StopReason


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return a step's figures of its rollouts, and of the student-written ones where there are any."""
    own = [rollout for rollout in rollouts if rollout.source == "student"]
    found = {"rollout/mean_tokens": _mean_tokens(rollouts), "rollout/student_share": len(own) / len(rollouts)}
    if own:
        found["rollout/student_mean_tokens"] = _mean_tokens(own)
        found["rollout/student_stop_share"] = sum(rollout.finish_reason == "stop" for rollout in own) / len(own)
    return found


def _mean_tokens(rollouts: Sequence[Rollout]) -> float:
    return sum(len(rollout.completion_ids) for rollout in rollouts) / len(rollouts)


@dataclass
class Monitor:
    """Follows the lines of metrics.jsonl. best_step: the step of the lowest held-out KL, 0 before the first one."""

    settings: DistillSection
    best_step: int = 0
    best_kl: float = math.inf
    since_best: int = 0
    _first: tuple[float, float] | None = None
    _live: list[tuple[float, float, float]] = field(default_factory=list)
    _warned: set[str] = field(default_factory=set)

    @classmethod
    def after(cls, settings: DistillSection, lines: Sequence[Line], step: int) -> "Monitor":
        """Take up the lines of the steps behind a checkpoint. Raises StoreError if some are missing."""
        if [line["step"] for line in lines] != list(range(1, step + 1)):
            raise StoreError(
                f"metrics.jsonl has {len(lines)} of the {step} steps behind the checkpoint, and what is watched during "
                "training follows from all of them; --force starts the variant again"
            )
        monitor = cls(settings)
        for line in lines:
            list(monitor.see(line))
        return monitor

    @property
    def exhausted(self) -> bool:
        """Tell whether training is to stop early."""
        return self.settings.stop_early and self.since_best >= self.settings.patience

    @property
    def best(self) -> int | None:
        """The step whose checkpoint is to be kept whatever its age, if there is one."""
        return self.best_step if self.settings.stop_early and self.best_step else None

    def outcome(self, steps: int) -> Outcome:
        """Say how training ended after so many steps."""
        return Outcome(steps, self.best or steps, "steps" if steps == self.settings.steps else "patience")

    def see(self, line: Line) -> Iterator[str]:
        """Take up one step's line and yield warnings, each kind once (of held-out KL, once after each new low)."""
        if HELDOUT_KL in line:
            yield from self._held_out(int(line["step"]), line[HELDOUT_KL])
        if self.settings.live and "rollout/student_mean_tokens" in line:
            count = line["rollout/student_share"] * self.settings.rows_per_step
            self._live.append((count, line["rollout/student_mean_tokens"], line["rollout/student_stop_share"]))
            yield from self._completions()

    def _held_out(self, step: int, kl: float) -> Iterator[str]:
        if kl < self.best_kl:
            self.best_step, self.best_kl, self.since_best = step, kl, 0
            return
        self.since_best += 1
        if self.since_best == self.settings.patience:
            yield (
                f"held-out KL has found no new low in {self.since_best} measurements: "
                f"{fixed(self.best_kl, 4)} after step {self.best_step}, {fixed(kl, 4)} now; lower distill.lr, or let "
                "distill.stop_early keep the lowest"
            )

    def _completions(self) -> Iterator[str]:
        last = _window(reversed(self._live))
        if last is None:
            return
        if self._first is None:
            self._first = last
            self._live.clear()
            return
        first = self._first
        if last[0] > GROWTH * first[0] and self._once("length"):
            yield f"the student's completions grow: {first[0]:.1f} tokens each at first, {last[0]:.1f} now; {_CURE}"
        if last[1] < ENDS_LEFT * first[1] and self._once("ends"):
            yield (
                f"the student stops ending its completions: {100 * first[1]:.0f} % ended by themselves at first, "
                f"{100 * last[1]:.0f} % now; {_CURE}"
            )

    def _once(self, kind: str) -> bool:
        new = kind not in self._warned
        self._warned.add(kind)
        return new


_CURE = "it trains on what it writes, so look at the variant's rollouts, lower distill.lr, or lower distill.lmbda"


def _window(steps: Iterable[tuple[float, float, float]]) -> tuple[float, float] | None:
    """Average tokens and ends over the first steps that make up ``WINDOW`` completions; None with fewer."""
    total = tokens = ends = 0.0
    for count, mean_tokens, stop_share in steps:
        total, tokens, ends = total + count, tokens + count * mean_tokens, ends + count * stop_share
        if total >= WINDOW:
            return tokens / total, ends / total
    return None
