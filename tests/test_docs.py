"""The README documents every command, option and preset, and prints nothing that does not exist."""

import re
from pathlib import Path

import pytest
import typer

from kdctl.cli.app import app
from kdctl.config.resolve import preset_names
from kdctl.sweep.space import sweep_names

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
GROUP = typer.main.get_command(app)
COMMANDS = dict(GROUP.commands)  # pyright: ignore[reportAttributeAccessIssue]
OPTIONS = sorted(
    {
        (name, option)
        for name, command in COMMANDS.items()
        for parameter in command.params
        for option in [*parameter.opts, *parameter.secondary_opts]
        if option.startswith("--")
    }
)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_documented_with_an_example(name: str) -> None:
    assert f"kdctl {name}" in README
    assert "Example: kdctl " + name in (COMMANDS[name].help or "")


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_is_documented(name: str, option: str) -> None:
    section = README[README.index("## Commands and options") :]
    rows = [
        line for line in section.splitlines() if line.startswith((f"| `kdctl {name}", "| all stages", "| `kdctl` "))
    ]
    assert any(f"`{option}" in row for row in rows)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_documented(name: str) -> None:
    assert f"`{name}`" in README or f"{name} " in README[README.index("## Presets") :]


@pytest.mark.parametrize("name", sweep_names())
def test_every_sweep_is_documented(name: str) -> None:
    assert f"`{name}`" in README


def test_options_in_the_readme_exist() -> None:
    known = {option for _, option in OPTIONS} | {"--version", "--help", "--constraint", "--no-deps", "--peer-python"}
    known |= {"--num_processes", "--multi_gpu", "--config_file", "--nproc-per-node", "--use_fsdp", "--fsdp_version"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) <= known
    assert "@@" not in README
