"""The documentation: a reference made from the code, links that lead somewhere, examples that do what they say."""

import importlib.util
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import typer
from typer.testing import CliRunner

from kdctl.cli.app import app
from kdctl.config.resolve import build_preset, preset_names
from kdctl.sweep.space import sweep_names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
MADE_BY_KDCTL = (DOCS / "study" / "report.md", DOCS / "study" / "mix" / "report.md")
COMMANDS = dict(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
OF_OTHERS = {
    *("--constraint", "--no-deps", "--num_processes", "--multi_gpu", "--config_file", "--nproc-per-node"),
    *("--num_machines", "--machine_rank", "--same_network", "--main_process_ip", "--main_process_port"),
    *("--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),  # torchrun
    *("--nodes", "--job-name", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time"),  # SLURM
    *("--signal", "--requeue", "--open-mode", "--wait"),
    *("--use_parallelism_config", "--parallelism_config_dp_replicate_size", "--parallelism_config_dp_shard_size"),
    *("--use_fsdp", "--fsdp_version", "--version", "--help", "--state", "--short", "--budget"),
    *("--generation-config", "--gpu-memory-utilization", "--no-enable-chunked-prefill", "--dtype"),  # vLLM
    *("--model-path", "--sampling-defaults", "--parallel", "--ctx-size", "--port"),  # SGLang, llama-server
}
BLOCK = re.compile(r"(?P<above>[^\n]*)\n+```console\n(?P<text>.*?)```", re.DOTALL)
PYTHON = re.compile(r"<!-- run -->\n+```python\n(.*?)```", re.DOTALL)
RUN = re.compile(r"<!-- run(?:: (?P<code>\d+))? -->")


def text_of(page: Path) -> str:
    """Read a page."""
    return page.read_text(encoding="utf-8")


def generator() -> ModuleType:
    """Import docs/generate.py, which lies outside the package."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says() -> None:
    for name, page in generator().PAGES.items():
        assert text_of(DOCS / name) == page(), f"docs/{name} is out of date: make docs"


def anchors(page: Path) -> set[str]:
    """List the anchors of a page's headings, as a forge and the site make them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere() -> None:
    for page in (*PAGES, ROOT / "benchmarks" / "RESULTS.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            place, _, anchor = link.partition("#")
            if place.startswith("https://"):
                continue
            target = (page.parent / place).resolve() if place else page
            assert target.is_file(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target), f"{page}: {link}"
            assert DOCS in target.parents or DOCS not in page.parents, f"{page}: {link} is not part of the site"


def test_every_page_is_in_the_menu() -> None:
    site = text_of(ROOT / "zensical.toml")
    listed = set(re.findall(r'"([\w/-]+\.md)"', site))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}


def test_the_front_page_is_short() -> None:
    assert len(text_of(PAGES[0]).splitlines()) <= 200


def test_every_command_has_an_example() -> None:
    for name, command in COMMANDS.items():
        assert f"Example: kdctl {name}" in (command.help or ""), name


def test_what_is_named_exists() -> None:
    options = {
        word for command in COMMANDS.values() for one in command.params for word in one.opts + one.secondary_opts
    }
    for page in PAGES:
        text = text_of(page)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text):
            assert option in options | OF_OTHERS, f"{page}: {option}"
        for module in re.findall(r"kdctl/[a-z_/]+\.py\b", text):
            assert (ROOT / module).is_file(), f"{page}: {module}"
        for command in re.findall(r"^(?:\$ |    )?kdctl ([a-z]+)", text, re.MULTILINE):
            assert command in COMMANDS, f"{page}: kdctl {command}"
    for name in sweep_names():
        assert f"`{name}`" in text_of(DOCS / "guides" / "sweeps.md"), name
    for name in preset_names():
        assert f"`{name}`" in text_of(DOCS / "reference" / "preset.md"), name


def test_printed_presets_are_valid() -> None:
    found = [block for page in PAGES for block in re.findall(r"```toml\n(.*?)```", text_of(page), re.DOTALL)]
    assert found
    for block in found:
        build_preset(tomllib.loads(block), {}, "a printed preset")


def examples() -> Iterator[tuple[str, int | None, str]]:
    """Yield every console block: its page, the exit code where it is to be run, else None, and its text."""
    for page in PAGES:
        for block in BLOCK.finditer(text_of(page)):
            run = RUN.fullmatch(block["above"])
            told = block["above"].startswith("Run elsewhere: ")
            place = f"{page.relative_to(ROOT)}: {block['text'].splitlines()[0]}"
            assert run or told or page in MADE_BY_KDCTL, (
                f"{place} is neither run by the tests nor marked as run elsewhere"
            )
            yield place, int(run["code"] or 0) if run else None, block["text"]


def test_every_console_block_says_whether_it_is_run() -> None:
    assert sum(code is not None for _, code, _ in examples()) >= 3


@pytest.mark.slow
def test_examples_in_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [code for page in PAGES for code in PYTHON.findall(text_of(page))]
    assert len(found[0].splitlines()) <= 15
    for code in found:
        exec(code, {})  # noqa: S102 - our own pages


@pytest.mark.slow
def test_examples_print_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    datasets.disable_progress_bars()
    for place, code, text in examples():
        if code is None:
            continue
        for command, *expected in (part.splitlines() for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]):
            program, *arguments = shlex.split(command)
            assert program == "kdctl", place
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == code, f"{place}: {done.output}"
            check_printed(done.output, expected, place)
    datasets.enable_progress_bars()


def check_printed(output: str, expected: list[str], place: str) -> None:
    """Check that the expected lines come in this order; ``...`` stands for any lines."""
    lines = [line.rstrip() for line in output.splitlines()]
    at = 0
    for line in expected:
        if line and line != "...":
            assert line in lines[at:], f"{place}: {line!r} is not in\n{output}"
            at = lines.index(line, at) + 1
