"""What is said to be worth doing after quantization."""

import re
from pathlib import Path

import pytest
from made_up import distribution, make_run

from kdctl.run.record_files import read_record
from kdctl.run.records import QuantizeReport
from kdctl.stages.outlook import CURVE, SEQUENCE_S, outlook, removed


def made(folder: Path, kl: float, method: str, seconds: float = 352 * SEQUENCE_S) -> QuantizeReport:
    report = read_record(make_run(folder, {}).student / "quantize.json", QuantizeReport)
    return report.model_copy(update={"distribution": distribution(kl), "method": method, "seconds_s": seconds})


def test_the_curve_is_read_between_its_points_and_not_beyond_them() -> None:
    assert [removed(minutes) for minutes, _ in CURVE] == [share for _, share in CURVE]
    assert removed((CURVE[0][0] + CURVE[1][0]) / 2) == pytest.approx((CURVE[0][1] + CURVE[1][1]) / 2)
    assert removed(10 * CURVE[-1][0]) == CURVE[-1][1]


def test_training_is_expected_to_bring_what_it_brought_where_it_was_measured(tmp_path: Path) -> None:
    said = outlook(made(tmp_path, 0.2, "kl"), 352)
    five, sixty = (0.2 * (1 - removed(minutes)) for minutes in (5, 60))
    assert said.startswith("next: kdctl distill")
    assert f"5 minutes of it to about {five:.4f}" in said
    assert f"60 minutes of it to about {sixty:.4f}" in said


def test_on_a_slower_machine_the_same_minutes_bring_less(tmp_path: Path) -> None:
    said = outlook(made(tmp_path, 0.2, "kl", seconds=2 * 352 * SEQUENCE_S), 352)
    assert f"5 minutes of it to about {0.2 * (1 - removed(2.5)):.4f}" in said


@pytest.mark.parametrize(
    ("kl", "method", "seconds", "words"),
    [
        (0.2, "gptq", 1.0, "next: --method kl .* left a KL of 0.084 where gptq left 0.126"),
        (0.2, "clipped", 1.0, "next: --method kl .* left a KL of 0.084$"),
        (0.0005, "kl", 1.0, "next: nothing;"),
        (0.2, "kl", 1e6, "less than 1% of this KL; plan hours"),
    ],
)
def test_what_else_may_be_worth_doing(tmp_path: Path, kl: float, method: str, seconds: float, words: str) -> None:
    said = outlook(made(tmp_path, kl, method, seconds), 352)
    assert re.search(words, said)
