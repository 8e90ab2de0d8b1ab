"""The table of a mixture's sources, from the lines of training."""

import json
from pathlib import Path

import pytest
from made_up import make_run

from kdctl.report.by_source import sources
from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.study_reader import read_study

STEPS = 8


def test_sources_have_shares_lengths_and_the_loss_of_both_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"a": {"steps": STEPS}, "plain": {}})
    lines = []
    for step in range(1, STEPS + 1):
        line = {"step": step, "train/forward_kl": 0.1}
        for name, share, length in (("web", 0.25, 40.0), ("chat", 0.75, 8.0)):
            tokens = {f"train/completion_tokens/{name}": share * length * 4, f"train/forward_kl/{name}": share / step}
            line |= tokens | {f"rollout/share/{name}": share, f"rollout/mean_tokens/{name}": length}
        lines.append(json.dumps(line))
    run.variant("a").metrics.write_text("\n".join(lines) + "\n")
    table = sources(Results(read_study([run]), Contrasts(0.005)))
    rows = [[cell.value for cell in row] for row in table.rows]
    quarter = [(1 + 1 / 2) / 2, (1 / 7 + 1 / 8) / 2]
    assert rows == [
        ["a", "chat", 0.75, 24 * STEPS, 8.0, *(pytest.approx(0.75 * one) for one in quarter)],
        ["a", "web", 0.25, 40 * STEPS, 40.0, *(pytest.approx(0.25 * one) for one in quarter)],
    ]
