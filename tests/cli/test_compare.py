"""``kdctl compare``."""

from collections.abc import Callable
from pathlib import Path

import tiny
from typer.testing import Result

from kdctl.run.record_files import read_record
from kdctl.run.records import EvalResult

SMALL = {
    "heldout.num_prompts": 4,
    "heldout.min_completion_tokens": 1,
    "heldout.max_new_tokens": 8,
    "heldout.text_tokens": 256,
}


def test_the_command_prints_both_kls_and_writes_a_page(
    tiny_dir: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    other = tiny.build(tmp_path / "other", seed=3)
    sets = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    done = invoke("compare", tiny_dir, other, "--run", tmp_path / "run", *sets)
    assert done.exit_code == 0, done.output
    assert "\n| other | " in done.stdout
    assert "KL(student‖teacher)" in done.stdout
    assert "top-1" in done.stdout
    assert read_record(tmp_path / "run" / "eval" / "other" / "results.json", EvalResult).reference == str(other)
    assert (tmp_path / "run" / "report" / "report.html").is_file()
    for stage in ("eval", "quantize", "run"):
        refused = invoke(stage, "--run", tmp_path / "run")
        assert refused.exit_code == 2
        assert "a folder of kdctl compare" in " ".join(refused.stderr.split())
    wrong = invoke("compare", tiny_dir, other, "--set", "distill.steps=3")
    assert wrong.exit_code == 2
    assert "evaluates and makes nothing" in wrong.stderr
