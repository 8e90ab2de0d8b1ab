"""What importing a folder brings along; who may import whom is a contract of import-linter in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "kdctl"
HEAVY = {"torch", "transformers", "datasets", "wandb", "lm_eval", "accelerate", "auto_round", "matplotlib", "hqq"}


def modules(*folders: str) -> list[str]:
    """List every module of some folders."""
    paths = [path for folder in folders for path in sorted((PACKAGE / folder).glob("*.py"))]
    return [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in paths
    ]


def loaded_after(names: list[str]) -> set[str]:
    """Import modules in a fresh process and return the heavy libraries that came along; no variable is set."""
    code = f"import os\nbefore = dict(os.environ)\nimport sys, {', '.join(names)}\nassert os.environ == before\n"
    code += f"print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_presets_records_and_the_command_line_import_nothing_heavy() -> None:
    assert loaded_after(modules("base", "config", "run", "cli", "quant/methods")) == set()


def test_a_report_needs_nothing_heavy() -> None:
    assert loaded_after(["kdctl.report.front", *modules("stats")]) == set()


def test_heavy_libraries_are_seen_at_all() -> None:
    assert "torch" in loaded_after(["kdctl.system.memory"])
