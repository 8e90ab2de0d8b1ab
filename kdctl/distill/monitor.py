"""What to look out for during training: held-out KL without a new low, longer completions, vanishing ends.

Everything here is a function of the lines of metrics.jsonl, so a resumed run decides what an undisturbed one decides.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kdctl import stats
from kdctl.base.errors import StoreError
from kdctl.config.preset import DistillSection
from kdctl.data.mixture import source_of, sources_of
from kdctl.run.measures import fixed
from kdctl.run.records import Rollout, StopReason
from kdctl.run.tracking import DOCUMENT

WINDOW = 64
"""Completions whose mean is held against that of the first as many."""
GROWTH = 1.5
"""Warn when completions are this many times as long as at first."""
ENDS_LEFT = 0.5
"""Warn when the share of completions that end by themselves falls below this share of what it was at first."""
ENOUGH = 0.01
"""Nothing more comes where surely less than this share of held-out KL went in ``patience`` measurements."""
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
    for name in sources_of(rollout.prompt_id for rollout in rollouts):
        part = [rollout for rollout in rollouts if source_of(rollout.prompt_id) == name]
        found |= {f"rollout/mean_tokens/{name}": _mean_tokens(part), f"rollout/share/{name}": len(part) / len(rollouts)}
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
    settled: bool = False
    """Paired over documents, the last measurements show that nothing more comes."""
    _first: tuple[float, float] | None = None
    _live: list[tuple[float, float, float]] = field(default_factory=list)
    _warned: set[str] = field(default_factory=set)
    _measured: list[list[float]] = field(default_factory=list)

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
        return self.settings.stop_early and (self.settled or self.since_best >= self.settings.patience)

    @property
    def best(self) -> int | None:
        """The step whose checkpoint is to be kept whatever its age, if there is one."""
        return self.best_step if self.settings.stop_early and self.best_step else None

    def outcome(self, steps: int) -> Outcome:
        """Say how training ended after so many steps."""
        ended = "settled" if self.since_best < self.settings.patience else "patience"
        return Outcome(steps, self.best or steps, "steps" if steps == self.settings.steps else ended)

    def see(self, line: Line) -> Iterator[str]:
        """Take up one step's line and yield warnings, each kind once (of held-out KL, once after each new low)."""
        if HELDOUT_KL in line:
            yield from self._held_out(int(line["step"]), line[HELDOUT_KL])
            yield from self._settles([value for name, value in line.items() if name.startswith(DOCUMENT)])
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

    def _settles(self, documents: list[float]) -> Iterator[str]:
        """Hold a measurement against the one ``patience`` before it, document by document."""
        self._measured.append(documents)
        window = self.settings.patience
        if not (documents and window and len(self._measured) > window and sum(self._measured[-1 - window]) > 0):
            return
        gone = stats.removed(documents, self._measured[-1 - window])
        self.settled = gone.high < ENOUGH
        if self.settled and self._once("settled"):
            low, high = 100 * gone.low, 100 * gone.high
            yield (
                f"the last {window} measurements removed {100 * gone.value:.1f} % [{low:.1f}, {high:.1f}] of held-out "
                f"KL, less than {100 * ENOUGH:g} %: more steps at this learning rate are not worth their "
                "time; one that still falls may remove more"
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
