"""Every start and end of the command line, as whoever started it sees it: streams, signals, what is missing."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdctl.cli.bug import without_secrets
from kdctl.cli.console import visible
from kdctl.cli.explain import explain
from kdctl.config.preset import Preset

KDCTL = [sys.executable, "-m", "kdctl"]


def shell(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which $K is kdctl."""
    environment = {**os.environ, **variables, "K": " ".join(KDCTL)}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_has_not_is_replaced_and_json_stays_what_it_is(encoding: str) -> None:
    done = shell("$K distill --help", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert "? (lmbda)" in done.stdout or "?: " in done.stdout
    schema = shell("$K presets --schema", PYTHONIOENCODING=encoding)
    assert json.loads(schema.stdout) == Preset.model_json_schema()


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("$K presets smoke > /dev/full", 2, "standard output: No space left on device"),
        ("$K presets --schema 2>&1 > >(head -c 1 > /dev/null; exec <&-); exit 0", 0, None),
        ("set -o pipefail; $K --help | true", 141, None),
        ("$K presets smoke >&- 2>&-", 0, None),
        ("$K presets smok 2> /dev/full", 2, None),
        ("$K presets $'a\\xff'", 2, "'a\\udcff' is not UTF-8 text"),
        ("$K presets $'a\\nb'", 2, "no preset 'a\\nb'"),
        ("RANK=x $K presets", 2, "RANK is 'x'"),
        ("RANK=5 WORLD_SIZE=2 $K quantize", 2, "RANK=5 and WORLD_SIZE=2, and ranks are"),
        ("$K run --set distill.steps=0x$(printf 'f%.0s' {1..5000})", 2, "has thousands of digits"),
        ("$K quantize --run ''", 2, "--run names no folder"),
        ("$K report --out=", 2, "--out= names no folder"),
        ("PYTHONPATH=broken:$PYTHONPATH $K presets", 2, "broken/rich/__init__.py is missing or broken (SyntaxError"),
    ],
)
def test_a_start_or_an_end_that_goes_wrong_is_one_message(
    command: str, code: int, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken" / "rich"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("1 +\n")
    here = os.getcwd()
    monkeypatch.chdir(tmp_path)
    done = shell(command, PYTHONPATH=os.environ.get("PYTHONPATH", here))
    assert done.returncode == code, done.stderr
    if said is None:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert said in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 5), (signal.SIGTERM, 2), (signal.SIGHUP, 1)])
def test_signals_end_with_their_code_and_one_message(tmp_path: Path, number: signal.Signals, times: int) -> None:
    command = [*KDCTL, "quantize", "--preset", "smoke", "--run", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)  # while torch is imported
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.02)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, "")
    assert err.startswith("error: stopped")
    assert err.count("\n") == 1


def test_names_cannot_break_a_line_or_steer_a_terminal() -> None:
    assert visible(" two\n  lines\x1b[2J \udcff λ 日本 5\u00a0% ") == "two lines\\x1b[2J \\udcff λ 日本 5\u00a0%"


def test_the_file_for_a_bug_holds_no_secret_and_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MY_TOKEN", "a-token-of-mine")
    text = f"{tmp_path}/runs a-token-of-mine hf_abcdefghijkl https://me:word@host/x " + "0" * 40
    assert without_secrets(text) == "~/runs *** *** https://***@host/x ***"


def test_the_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(b"\xff\xff")

    def read(place: Path) -> str:
        return place.read_text(encoding="utf-8")

    with pytest.raises(UnicodeDecodeError) as caught:
        read(path)
    assert str(path) in explain(caught.value).message


def test_anything_else_is_a_bug() -> None:
    assert explain(AttributeError("x")).code == explain(RuntimeError("a bug")).code == 70


def test_a_variable_that_a_package_cannot_read_is_blamed_and_not_the_package(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "odd_package.py").write_text("import os\nint(os.environ['ODD'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ODD", "nonsense")
    with pytest.raises(ValueError, match="nonsense") as caught:
        importlib.import_module("odd_package")
    assert "the environment variable ODD keeps the package odd_package" in explain(caught.value).message
