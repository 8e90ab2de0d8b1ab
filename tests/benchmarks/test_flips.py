"""What changed codes win and cost: the parts add up to what was measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdctl.config.preset import Preset
from kdctl.config.resolve import build_preset
from kdctl.stages import pipeline
from kdctl.stages.context import open_run

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "flips.py"


@pytest.mark.slow
def test_the_parts_add_up_to_what_training_removed(smoke: Preset, tmp_path: Path) -> None:
    preset = build_preset(smoke.model_dump(), {"distill.lr": 0.01}, "test")
    pipeline.distill(*open_run(preset, tmp_path / "run"), name="mine")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "run"), "--draws", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == 3
    name, changed, *cells = (cell.strip() for cell in printed[2].strip("|").split("|"))
    assert name == "mine"
    assert float(changed.rstrip(" %")) > 0
    values = [float(re.match(r"-?[\d.]+", cell).group()) for cell in cells]  # pyright: ignore[reportOptionalMemberAccess]
    removed, won, alone, together, half, predicted = values
    assert removed == pytest.approx(won - alone - together, abs=0.16)
    assert predicted == pytest.approx(won / 2 - alone / 2 - together / 4, abs=0.16)
    assert half != removed
