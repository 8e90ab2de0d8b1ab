"""What is watched during training, on made-up metrics lines."""

import numpy as np
import pytest

from kdctl.base.errors import StoreError
from kdctl.config.preset import DistillSection
from kdctl.distill.monitor import WINDOW, Monitor, rollout_metrics
from kdctl.run.records import Rollout

LIVE = DistillSection(lmbda=1.0, micro_batch_size=4)
STEPS = WINDOW // 4


def held_out(values: list[float], start: int = 1) -> list[dict[str, float]]:
    return [{"step": start + i, "eval/forward_kl": value} for i, value in enumerate(values)]


def live(tokens: float, stops: float, steps: range) -> list[dict[str, float]]:
    figures = {"rollout/student_share": 1.0, "rollout/student_mean_tokens": tokens, "rollout/student_stop_share": stops}
    return [{"step": step, **figures} for step in steps]


def warnings(monitor: Monitor, lines: list[dict[str, float]]) -> list[tuple[float, str]]:
    return [(line["step"], text) for line in lines for text in monitor.see(line)]


def test_held_out_kl_without_a_new_low_warns_once_after_each_low() -> None:
    monitor = Monitor(DistillSection(patience=2))
    found = warnings(monitor, held_out([0.5, 0.4, 0.41, 0.4, 0.45, 0.3, 0.31, 0.32, 0.33]))
    assert [step for step, _ in found] == [4, 8]
    assert "0.4000 after step 2, 0.4000 now" in found[0][1]
    assert (monitor.best_step, monitor.best_kl) == (6, 0.3)
    assert not monitor.exhausted
    assert monitor.best is None


def test_no_patience_never_warns() -> None:
    assert warnings(Monitor(DistillSection(patience=0)), held_out([0.1, 0.2, 0.3, 0.4])) == []


def test_early_stop_keeps_the_lowest_however_training_ends() -> None:
    monitor = Monitor(DistillSection(patience=2, stop_early=True, steps=9))
    warnings(monitor, held_out([0.5, 0.4, 0.6]))
    assert (monitor.exhausted, monitor.best) == (False, 2)
    assert (monitor.outcome(9).kept_step, monitor.outcome(9).stopped) == (2, "steps")
    warnings(monitor, held_out([0.7], 4))
    assert monitor.exhausted
    assert (monitor.outcome(4).steps, monitor.outcome(4).kept_step, monitor.outcome(4).stopped) == (4, 2, "patience")
    assert monitor.outcome(9).stopped == "steps"


def by_document(kls: list[float], gains: list[float], noise: float = 0.0) -> list[dict[str, float]]:
    """Make measurements of documents that each lose a share of their KL from one to the next, more or less."""
    drawn = np.random.default_rng(0).normal(0, noise, (len(gains), len(kls))) if noise else np.zeros((len(gains), 1))
    lines, now = [], np.array(kls)
    for index, (gain, off) in enumerate(zip(gains, drawn, strict=True)):
        now = now * (1 - gain + off)
        line = {"step": index + 1, "eval/forward_kl": float(now.mean())}
        lines.append(line | {f"document/{at}": float(value) for at, value in enumerate(now)})
    return lines


KLS = [float(value) for value in np.random.default_rng(1).lognormal(0, 1, 16)]


@pytest.mark.parametrize(
    ("gains", "noise", "settled"),
    [
        ([0.0, 0.05, 0.05, 0.05], 0.0, False),
        ([0.0, 0.05, 0.002, 0.002], 0.0, True),
        ([0.0, 0.0, -0.05, -0.05], 0.0, True),
        ([0.0, 0.05, 0.01, 0.01], 0.1, False),  # so few documents cannot tell
    ],
)
def test_training_settles_where_documents_in_pairs_surely_gain_nothing(
    gains: list[float], noise: float, settled: bool
) -> None:
    monitor = Monitor(DistillSection(patience=2, stop_early=True, steps=9))
    found = warnings(monitor, by_document(KLS, gains, noise))
    assert (monitor.settled, sum("less than 1 %" in text for _, text in found)) == (settled, settled)
    if settled:
        assert monitor.exhausted
        assert not Monitor(DistillSection(patience=2)).exhausted
    if settled and monitor.since_best < 2:
        assert monitor.outcome(4).stopped == "settled"


def test_before_a_whole_window_and_without_any_kl_nothing_settles() -> None:
    monitor = Monitor(DistillSection(patience=3, stop_early=True))
    warnings(monitor, by_document(KLS, [0.0, 0.0, 0.0]))
    assert not monitor.settled
    warnings(nothing := Monitor(DistillSection(patience=2, stop_early=True)), by_document([0.0] * 16, [0.0] * 5))
    assert not nothing.settled


def test_growing_completions_and_vanishing_ends_warn_once_each() -> None:
    monitor = Monitor(LIVE)
    assert warnings(monitor, live(20.0, 0.8, range(1, 1 + 2 * STEPS))) == []
    found = warnings(monitor, live(40.0, 0.1, range(1 + 2 * STEPS, 1 + 5 * STEPS)))
    assert len(found) == 2
    assert sum("20.0 tokens each at first" in text for _, text in found) == 1
    assert sum("80 % ended by themselves at first" in text for _, text in found) == 1


@pytest.mark.parametrize(("tokens", "stops"), [(29.0, 0.8), (20.0, 0.41), (5.0, 1.0)])
def test_ordinary_changes_do_not_warn(tokens: float, stops: float) -> None:
    lines = live(20.0, 0.8, range(1, 1 + STEPS)) + live(tokens, stops, range(1 + STEPS, 1 + 3 * STEPS))
    assert warnings(Monitor(LIVE), lines) == []


def test_completions_that_never_ended_have_no_end_to_lose() -> None:
    assert warnings(Monitor(LIVE), live(16.0, 0.0, range(1, 1 + 4 * STEPS))) == []


def test_only_live_completions_are_watched() -> None:
    lines = live(20.0, 0.8, range(1, 1 + STEPS)) + live(90.0, 0.0, range(1 + STEPS, 1 + 3 * STEPS))
    for settings in (DistillSection(), LIVE.model_copy(update={"refresh_every": 0})):
        assert warnings(Monitor(settings), lines) == []


@pytest.mark.parametrize("cut", range(9))
def test_a_monitor_that_took_up_earlier_lines_equals_one_that_saw_them(cut: int) -> None:
    settings = LIVE.model_copy(update={"patience": 2, "stop_early": True})
    kls = [0.5, 0.4, 0.45, 0.3, 0.31, 0.29, 0.4, 0.5]
    lines = [{**a, **b} for a, b in zip(held_out(kls), live(9.0, 0.5, range(1, 9)), strict=True)]
    whole, resumed = Monitor(settings), Monitor.after(settings, lines[:cut], cut)
    everything = warnings(whole, lines)
    assert warnings(resumed, lines[cut:]) == [entry for entry in everything if entry[0] > cut]
    assert resumed == whole


@pytest.mark.parametrize("lines", [[], held_out([0.5]), held_out([0.5, 0.4, 0.3])[1:], held_out([0.5] * 4)])
def test_missing_lines_are_refused(lines: list[dict[str, float]]) -> None:
    with pytest.raises(StoreError, match=rf"has {len(lines)} of the 3 steps.*--force"):
        Monitor.after(DistillSection(), lines, 3)


def test_a_step_counts_its_student_written_completions() -> None:
    def rollout(source: str, tokens: int, ended: bool) -> Rollout:
        return Rollout("p", 0, 0, [1], [2] * tokens, None, "stop" if ended else "length", 0, 0, source)

    own = [rollout("student", 4, True), rollout("student", 8, False)]
    assert rollout_metrics([*own, rollout("teacher", 6, True), rollout("teacher", 2, True)]) == {
        "rollout/mean_tokens": 5.0,
        "rollout/student_share": 0.5,
        "rollout/student_mean_tokens": 6.0,
        "rollout/student_stop_share": 0.5,
    }
    assert rollout_metrics([rollout("teacher", 6, True)]) == {"rollout/mean_tokens": 6.0, "rollout/student_share": 0.0}
