"""The command line: instant where no model is needed, one clear message for a user's mistake, and the whole job."""

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import httpx
import pyarrow as pa
import pytest
import torch
import typer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result
from wandb.errors import UsageError

from kdctl.base.errors import StoreError
from kdctl.base.version import __version__
from kdctl.cli import app as cli
from kdctl.config.preset import Preset
from kdctl.config.resolve import known_keys, load_preset
from kdctl.report.front import Excerpt, write_report
from kdctl.run.locks import Use
from kdctl.run.paths import RunDir
from kdctl.stages import divided, evaluate, pipeline, rollout
from kdctl.stages.context import open_run

COMMANDS = ("quantize", "rollout", "distill", "eval", "report", "run", "presets", "verify", "sweep")
STAGES = ("quantize", "rollout", "distill", "eval", "run")
HEAVY = ("torch", "transformers", "datasets", "wandb", "lm_eval", "accelerate")
TELL = (
    "import atexit, pathlib, sys\n"
    "from kdctl.cli.app import main\n"
    "report = pathlib.Path(sys.argv.pop(1))\n"
    f"atexit.register(lambda: report.write_text(' '.join(set({HEAVY!r}) & set(sys.modules))))\n"
    "main()"
)
Kdctl = Callable[..., subprocess.CompletedProcess[str]]
Invoke = Callable[..., Result]


def spawn(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line as its user does."""
    command = [sys.executable, "-m", "kdctl", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def light(tmp_path: Path) -> Kdctl:
    """Run the command line in a process of its own, and check that it imported nothing heavy."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        tell = tmp_path / "imported"
        command = [sys.executable, "-c", TELL, str(tell), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert tell.read_text() == ""
        return done

    return run


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """Run the command line in this process; a model that is loaded is a failure."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    for stage, load in ((rollout, "load_student_model"), (divided, "load_student"), (evaluate, "load_student_model")):
        monkeypatch.setattr(stage, load, refuse)
    datasets.disable_progress_bars()  # imported long ago, it does not see the variable that the command line sets
    before = dict(os.environ)
    yield lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    os.environ.clear()
    os.environ.update(before)
    datasets.enable_progress_bars()


def check_refused(done: Any, *parts: str, of: str = "") -> None:
    """Check for exit code 2, nothing on stdout and one clear message on stderr."""
    code = done.exit_code if isinstance(done, Result) else done.returncode
    assert code == 2, (of, done.stderr)
    assert done.stdout == "", of
    assert done.stderr.startswith("error: "), (of, done.stderr)
    assert done.stderr.count("\n") == 1, (of, done.stderr)
    for part in parts:
        assert part in done.stderr, (of, done.stderr)


# --- instant ----------------------------------------------------------------------------------------------------------


def test_help_lists_every_command(light: Kdctl) -> None:
    done = light("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in COMMANDS:
        assert re.search(rf"│ {name} ", done.stdout)


def test_version(light: Kdctl) -> None:
    assert light("--version").stdout == f"kdctl {__version__}\n"


def test_presets_lists_every_one_with_its_purpose(light: Kdctl) -> None:
    done = light("presets")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("quickstart", "offpolicy", "mixed", "onpolicy", "smoke"):
        assert re.search(rf"^{name} +\w", done.stdout, re.MULTILINE)


def test_one_preset_is_shown_resolved(light: Kdctl) -> None:
    done = light("presets", "smoke", "--set", "distill.lr=0.25")
    assert Preset.model_validate_json(done.stdout) == load_preset("smoke", {"distill.lr": 0.25})
    shown = json.loads(done.stdout)
    assert [f"{name}.{key}" for name in shown if name != "description" for key in shown[name]] == known_keys()[1:]


def test_the_schema_is_json_and_describes_fields(light: Kdctl) -> None:
    schema = json.loads(light("presets", "--schema").stdout)
    assert "λ" in schema["$defs"]["DistillSection"]["properties"]["lmbda"]["description"]


def test_a_dry_run_prints_the_resolved_preset_and_leaves_nothing(light: Kdctl, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = light("distill", "--preset", "smoke", "--run", folder, "--lambda", "0.25", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert Preset.model_validate_json(done.stdout) == load_preset("smoke", {"distill.lmbda": 0.25})
    assert not folder.exists()


MISTAKES = [
    ("quantize --preset smoke --set quantize.bist=4", ("quantize.bist", "did you mean 'quantize.bits'?")),
    ("distill --preset smoke --set distill.lambda=1", ("distill.lambda", "did you mean 'distill.lmbda'?")),
    ("rollout --preset smoke --set nonsense", ("'nonsense'", "section.field=value")),
    ("run smok", ("'smok'", "did you mean 'smoke'?")),
    ("distill --preset smoke --lambda 1.5", ("distill.lmbda=1.5",)),
    ("distill --preset smoke --lr inf", ("distill.lr=inf",)),
    ("distill --preset smoke --wandb maybe", ("tracking.wandb='maybe'", "'offline'")),
    ("quantize --preset smoke --bits 8 --asymmetric", ("bits=8", "quantize.symmetric=true")),
    ("rollout --preset smoke --min-new-tokens 99", ("min_new_tokens=99", "max_new_tokens=16")),
    ("eval --preset smoke --limit 0", ("eval.limit=0",)),
    ("rollout --preset smoke --show 2 --json", ("--show", "--json")),
    ("report --run nowhere --table nonsense", ("'nonsense'", "markdown, csv, json, latex, html")),
    ("report --run nowhere --table csv --wide", ("--wide", "--table csv", "leave one")),
    ("report --run nowhere --layout nonsense", ("'nonsense'", "main, lambda, beta", "auto")),
    ("report --run nowhere --margin 0", ("--margin 0", "--margin 0.5")),
    ("report --run nowhere --margin -1", ("--margin -1",)),
    ("report somewhere --run nowhere", ("--run",)),
    ("report --run nowhere", ("nowhere", "--run")),
    ("presets --set distill.lr=1", ("--set", "kdctl presets quickstart --set distill.lr=1")),
    ("presets smoke --schema --set distill.lr=1", ("--set", "name one")),
]
REFUSE = f"""
import json, sys
from typer.testing import CliRunner
from kdctl.cli import app
done = [CliRunner().invoke(app.app, arguments) for arguments in json.load(sys.stdin)]
found = [dict(returncode=one.exit_code, stdout=one.stdout, stderr=one.stderr) for one in done]
json.dump([found, sorted(set({HEAVY!r}) & set(sys.modules))], sys.stdout)
"""


def test_mistakes_in_the_settings_are_refused_with_nothing_heavy_imported() -> None:
    asked = json.dumps([shlex.split(arguments) for arguments, _ in MISTAKES])
    child = subprocess.run([sys.executable, "-c", REFUSE], input=asked, capture_output=True, text=True, check=True)
    found, heavy = json.loads(child.stdout)
    assert heavy == []
    for (arguments, parts), done in zip(MISTAKES, found, strict=True):
        check_refused(SimpleNamespace(**done), *parts, of=arguments)


@pytest.mark.parametrize(
    "arguments", ["nonsense", "quantize --bits four", "rollout --source nobody", "eval --nonsense"]
)
def test_a_mistake_in_the_usage_is_refused_with_the_usage(invoke: Invoke, arguments: str) -> None:
    done = invoke(*shlex.split(arguments))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Usage:" in done.stderr
    assert "Traceback" not in done.stderr


# --- help and options -------------------------------------------------------------------------------------------------


def help_text(invoke: Invoke, *command: str) -> str:
    """Return a command's help as one line without frames."""
    done = invoke(*command, "--help")
    assert done.exit_code == 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stdout).split())


def example(name: str) -> str:
    """Return the example in a command's documentation."""
    (command,) = (each for each in cli.app.registered_commands if (each.name or each.callback.__name__) == name)  # pyright: ignore
    (found,) = re.findall(r"Example: (kdctl .*)", command.callback.__doc__ or "")
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_of_itself(invoke: Invoke, name: str) -> None:
    assert f"Example: {example(name)}" in help_text(invoke, name)
    assert shlex.split(example(name))[:2] == ["kdctl", name]


@pytest.mark.parametrize("name", STAGES)
def test_every_example_is_a_valid_command(invoke: Invoke, name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*shlex.split(example(name))[1:], "--dry-run")
    assert done.exit_code == 0
    assert Preset.model_validate_json(done.stdout).teacher == load_preset("quickstart").teacher


@pytest.mark.parametrize("name", STAGES)
def test_help_says_where_preset_and_folder_come_from(invoke: Invoke, name: str) -> None:
    text = help_text(invoke, name)
    assert "the run folder's own, or quickstart" in text
    assert "runs/<preset name>" in text


def test_every_option_is_described(invoke: Invoke) -> None:
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__  # pyright: ignore
        for parameter in typer.main.get_command(cli.app).commands[name].params:  # pyright: ignore
            assert parameter.help, f"{name} {parameter.name}"


def dry(invoke: Invoke, *arguments: object) -> Preset:
    """Return the preset that a command resolves to."""
    done = invoke(*arguments, "--dry-run")
    assert done.exit_code == 0, done.stderr
    return Preset.model_validate_json(done.stdout)


def test_flags_win_over_set_and_set_over_the_preset(invoke: Invoke) -> None:
    both = ("distill", "--preset", "smoke", "--set", "distill.beta=0.25", "--set", "distill.steps=3", "--beta", "0.75")
    preset = dry(invoke, *both)
    assert (preset.distill.beta, preset.distill.steps) == (0.75, 3)


def test_options_that_are_not_given_leave_the_preset_alone(invoke: Invoke, tmp_path: Path) -> None:
    special = load_preset("smoke", {"quantize.skip": ["*.down_proj"], "quantize.symmetric": True, "eval.limit": 3})
    path = tmp_path / "special.json"
    path.write_text(special.model_dump_json())
    for name in ("quantize", "rollout", "distill", "eval"):
        assert dry(invoke, name, "--preset", path) == special


def test_a_folder_without_a_preset_option_uses_its_own(invoke: Invoke, tmp_path: Path) -> None:
    own = load_preset("smoke", {"distill.steps": 3})
    (tmp_path / "preset.json").write_text(own.model_dump_json())
    for name in STAGES:
        assert dry(invoke, name, "--run", tmp_path) == own
    assert dry(invoke, "quantize", "--preset", "quickstart", "--run", tmp_path) == load_preset("quickstart")


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ("run smoke", "runs/smoke"),
        ("run", "runs/quickstart"),
        ("run presets/mine.toml", "runs/mine"),
        ("run smoke --run here", "here"),
    ],
)
def test_the_folder_is_named_after_the_preset(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, folder: str
) -> None:
    mine = tmp_path / "presets" / "mine.toml"
    mine.parent.mkdir()
    mine.write_text("[teacher]\nmodel = 'pkg:kdctl/data/tiny'\n[quantize]\ngroup_size = 32\n")
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "preset.json").write_text(load_preset("smoke").model_dump_json())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "run_all", lambda context, _: Excerpt((f"ran in {context.paths.path}",)))
    done = invoke(*shlex.split(arguments))
    assert (done.exit_code, done.stdout) == (0, f"ran in {folder}\n")
    assert (tmp_path / folder / "preset.json").is_file()


def test_a_new_folder_without_a_preset_is_told_once(invoke: Invoke, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "run_all", lambda context, _: Excerpt(("ran",)))
    settings = ("--set", "teacher.model=pkg:kdctl/data/tiny", "--set", "quantize.group_size=32")
    first = invoke("run", "--run", tmp_path / "typo", *settings)
    assert (first.exit_code, first.stdout) == (0, "ran\n"), first.stderr
    assert first.stderr == f"new run folder {tmp_path / 'typo'}, from preset quickstart\n"
    assert invoke("run", "--run", tmp_path / "typo").stderr == ""
    assert invoke("run", "smoke", "--run", tmp_path / "told").stderr == ""


# --- mistakes that need a look at models and files --------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Return a folder of prompt files that are no good."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "empty.jsonl").write_text("")
    (folder / "columns.jsonl").write_text('{"text": "hello"}\n')
    (folder / "broken.jsonl").write_text('{"prompt": \n')
    (folder / "sharegpt.jsonl").write_text('{"messages": [{"from": "human", "value": "hello"}]}\n')
    return folder


@pytest.mark.parametrize("field", ["train", "heldout"])
@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("empty.jsonl", "empty"),
        ("columns.jsonl", "'messages' or 'prompt'"),
        ("broken.jsonl", "cannot be read"),
        ("sharegpt.jsonl", "role"),
        ("missing.jsonl", "no prompt file"),
    ],
)
def test_prompts_that_are_no_good_are_refused_before_a_model_is_loaded(
    invoke: Invoke, prompts: Path, tmp_path: Path, field: str, file: str, part: str
) -> None:
    setting = f"prompts.{field}={prompts / file}"
    check_refused(invoke("run", "smoke", "--run", tmp_path / "runs" / "run", "--set", setting), part)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("quantize --group-size 48", ("group_size=48", "in_features=64", "quantize.skip")),
        ("quantize --teacher ./nope", ("nope", "Hub id")),
        ("quantize --teacher no/such-model", ("no/such-model", "offline")),
        ("quantize --teacher pkg:no_such_package/x", ("no_such_package", "pip install")),
        ("quantize --skip *.nope", ("'*.nope'", "matches no linear layer")),
        ("distill --name ../../elsewhere", ("'../../elsewhere'",)),
        ("distill --name teacher", ("'teacher'",)),
        ("eval nope", ("'nope'", "teacher, ptq")),
    ],
)
def test_a_mistake_is_refused_before_a_model_is_loaded(
    invoke: Invoke, tmp_path: Path, arguments: str, parts: tuple[str, ...]
) -> None:
    check_refused(invoke(*shlex.split(arguments), "--preset", "smoke", "--run", tmp_path / "run"), *parts)
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize("name", ["run smoke", "eval --preset smoke"])
@pytest.mark.slow  # lm-eval indexes its thousands of tasks to suggest one
def test_an_unknown_task_is_refused_before_a_model_is_loaded(invoke: Invoke, tmp_path: Path, name: str) -> None:
    done = invoke(*name.split(), "--run", tmp_path / "run", "--set", "eval.tasks=['arc_esy_offline']")
    check_refused(done, "'arc_esy_offline'", "did you mean 'arc_easy_offline'?")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("quantize --preset quickstart", ("teacher.model='pkg:kdctl/data/tiny'", "SmolLM2", "--run")),
        ("distill --set teacher.dtype=float32", ("teacher.dtype='bfloat16'", "'float32'")),
        ("eval --set quantize.group_size=16", ("quantize.group_size=32", "16")),
        ("quantize --bits 3", ("quantize.bits=4", "3")),
    ],
)
def test_a_folder_of_another_teacher_or_quantizer_is_refused_with_both_values(
    invoke: Invoke, tmp_path: Path, arguments: str, parts: tuple[str, ...]
) -> None:
    open_run(load_preset("smoke"), tmp_path)
    before = (tmp_path / "preset.json").read_bytes()
    check_refused(invoke(*shlex.split(arguments), "--run", tmp_path), *parts)
    assert (tmp_path / "preset.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--compare minmax,gtpq", ("--compare: no method 'gtpq' (did you mean 'gptq'?)", "it takes autoround,")),
        ("--compare minmax --method hqq", ("--compare", "--method")),
        ("--compare ''", ("--compare: no method ''; it takes autoround, ",)),
    ],
)
def test_a_comparison_of_unknown_methods_is_refused(
    invoke: Invoke, tmp_path: Path, arguments: str, parts: tuple[str, ...]
) -> None:
    folder = tmp_path / "run"
    check_refused(invoke("quantize", *shlex.split(arguments), "--preset", "smoke", "--run", folder), *parts)
    assert not folder.exists()


@pytest.mark.parametrize("kept", ["", "result", "user", "folder", "bug"])
def test_a_folder_made_for_an_input_that_is_refused_is_taken_back(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    folder, others = tmp_path / "run", []

    def fail(context: Any, *_: object, **__: object) -> None:
        assert context.paths.preset.is_file()
        if kept == "result":
            context.paths.student.mkdir()
        if kept == "user":
            others.append(Use(context.paths.lock("open")))
        raise ValueError("a bug") if kept == "bug" else StoreError("no good")

    if kept == "folder":
        folder.mkdir()
    monkeypatch.setattr(pipeline, "quantize", fail)
    done = invoke("quantize", "--preset", "smoke", "--run", folder)
    assert done.exit_code == (70 if kept == "bug" else 2), done.stderr
    assert folder.exists() == bool(kept)
    corrected = invoke("quantize", "--preset", "smoke", "--run", folder, "--group-size", "16")
    assert ("was made with quantize.group_size=32" in corrected.stderr) == bool(kept)


@pytest.mark.parametrize("name", ["quantize", "rollout", "distill", "eval"])
def test_a_folder_that_cannot_be_written_is_refused(invoke: Invoke, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    done = invoke(name, "--preset", "smoke", "--run", tmp_path / "file" / "run")
    check_refused(done, str(tmp_path / "file" / "run"), "--run")


@pytest.mark.slow
def test_a_mistake_is_refused_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = spawn("quantize", "--preset", "smoke", "--run", tmp_path / "run", "--group-size", 48)
    check_refused(done, "group_size=48")


# --- stopping and failing ---------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., None]:
    def stage(*_: object) -> None:
        raise error

    return stage


def test_ctrl_c_ends_with_130_and_one_line(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "run_all", raising(KeyboardInterrupt()))
    done = invoke("run", "smoke", "--run", tmp_path)
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.startswith("error: stopped; ")
    assert done.stderr.count("\n") == 1


def test_an_error_of_ours_says_so_and_leaves_a_file(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abc-secret-xyz")
    monkeypatch.setattr(pipeline, "run_all", raising(AttributeError("no abc-secret-xyz")))
    done = invoke("run", "smoke", "--run", tmp_path, "--set", "distill.steps=3")
    (file,) = tmp_path.glob("kdctl-bug-*.txt")
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (70, "", 1)
    assert "this is a bug in kdctl: AttributeError: no " in done.stderr
    assert str(file) in done.stderr
    text = file.read_text()
    for part in ("Traceback", "raise error", "torch ", '"steps": 3'):
        assert part in text
    assert "abc-secret-xyz" not in text
    monkeypatch.setattr(pipeline, "run_all", raising(StoreError("not a bug")))
    check_refused(invoke("run", "smoke", "--run", tmp_path), "not a bug")


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(28, "No space left on device", "shard-0"), ("shard-0", "No space left on device")),
        (FileNotFoundError(2, "No such file", "x"), ("x: No such file",)),
        (OSError("the words of a library\nand more"), ("the words of a library",)),
        (MemoryError(), ("memory", "distill.micro_batch_size")),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ("memory", "rollout.batch_size")),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ("memory",)),
        (SafetensorError("Error while deserializing header"), ("damaged", "deserializing")),
        (pa.ArrowInvalid("Not a Parquet file"), ("damaged", "Parquet")),
        (httpx.ConnectError("no route to host"), ("network", "no route to host", "runtime.offline")),
        (UsageError("api_key not configured"), ("api_key not configured", "tracking.wandb=offline")),
        (ImportError("cannot import name x", name="hqq.core"), ("package hqq is missing or broken",)),
        (StoreError("two\nlines \x1b[31m"), ("two lines \\x1b[31m",)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_disk_network_and_memory_do_is_one_message(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, parts: tuple[str, ...]
) -> None:
    monkeypatch.setattr(pipeline, "run_all", raising(error))
    check_refused(invoke("run", "smoke", "--run", tmp_path), *parts)
    assert not list(tmp_path.glob("kdctl-bug-*"))


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdctl", "run", "smoke", "--run", str(tmp_path)]
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # also where these tests do not
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 120
    while not (tmp_path / "student" / "quantize.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].startswith("error: stopped; ")
    assert "Traceback" not in err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "student").iterdir()}
    done = spawn("run", "smoke", "--run", tmp_path)
    assert done.returncode == 0
    assert "student is complete, skipped" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "student").iterdir()} == before


# --- the whole job ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run the smoke preset once, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, spawn("run", "smoke", "--run", folder)


def table_of(printed: str) -> str:
    """Cut the first Markdown table out of what was printed."""
    lines = printed.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| model"))
    return "\n".join(lines[start : lines.index("", start)])


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Return the bytes and modification time of every file."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".locks")
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.slow
def test_the_smoke_preset_prints_exactly_its_table(whole) -> None:
    folder, done = whole
    assert done.returncode == 0
    assert done.stdout == write_report([RunDir(folder)]).text()
    assert table_of(done.stdout).strip() in (folder / "report" / "report.md").read_text()
    assert [line.split("|")[1].strip() for line in table_of(done.stdout).splitlines()[2:]] == [
        "teacher",
        "ptq",
        "lambda0_beta0_lr0.001_seed0",
    ]


@pytest.mark.slow
def test_the_smoke_preset_does_not_chatter(whole) -> None:
    _, done = whole
    for word in ("Warning", "warning", "it/s", "%|", "\r", "\x1b"):
        assert word not in done.stderr
    ours = re.compile(
        r"(completions|quantizing|generating|distilling|evaluating|teacher|student|PTQ|distilled|no|checkpoints:|"
        r"verdicts) .*"
    )
    assert [line for line in done.stderr.splitlines() if not ours.fullmatch(line)] == []


@pytest.mark.slow
def test_a_second_run_skips_every_stage_and_touches_nothing(whole, invoke: Invoke) -> None:
    folder, first = whole
    before = contents(folder)
    done = invoke("run", "smoke", "--run", folder)
    assert (done.exit_code, done.stdout) == (0, first.stdout)
    *lines, last = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["quantize", "rollout", "distill", "eval", "eval", "eval"]
    assert all(line.endswith("is complete, skipped") for line in lines)
    assert last == f"verdicts in full and all tables: {folder / 'report' / 'report.html'}"
    assert contents(folder) == before


@pytest.mark.slow
def test_report_prints_every_form(whole, light: Kdctl) -> None:
    folder, first = whole
    assert light("report", "--run", folder).stdout == first.stdout
    flat = list(csv.DictReader(io.StringIO(light("report", "--run", folder, "--table", "csv").stdout)))
    (main,) = json.loads(light("report", folder, "--table", "json").stdout)
    rows = main["rows"]
    assert light("report", folder, "--table", "latex").stdout.startswith("\\begin{table}")
    assert light("report", folder, "--table", "html", "--layout", "auto").stdout.startswith('<table id="main">')
    assert [row["model"] for row in flat] == [row["model"] for row in rows]
    assert [float(row["perplexity"]) for row in flat] == [row["perplexity"] for row in rows]


@pytest.mark.slow
def test_every_stage_prints_json(whole, invoke: Invoke) -> None:
    folder, _ = whole
    printed = {}
    for name in ("quantize", "rollout", "distill", "eval"):
        done = invoke(name, "--run", folder, "--json")
        assert done.exit_code == 0, done.stderr
        printed[name] = json.loads(done.stdout)
    assert printed["quantize"]["bits"] == 4
    assert printed["rollout"]["teacher"]["source"] == "teacher"
    assert printed["distill"]["variant"] == "lambda0_beta0_lr0.001_seed0"
    assert list(printed["eval"]) == ["teacher", "ptq", "lambda0_beta0_lr0.001_seed0"]


@pytest.mark.slow
def test_rollouts_can_be_looked_at(whole, invoke: Invoke) -> None:
    folder, _ = whole
    done = invoke("rollout", "--run", folder, "--show", 2)
    assert done.exit_code == 0
    assert done.stdout.count("--- prompt\n") == done.stdout.count("--- completion\n") == 2
    assert "<|im_start|>user" in done.stdout
