"""The campaign reports what its parts find, repeats one case, and goes on where it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[2] / "benchmarks" / "campaign.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CAMPAIGN.exists(), reason="needs benchmarks/"),
]
PART = '''
"""Three is never drawn."""
from parts.base import Broken, shared
from parts.warm import run_kdctl
SHORT, FULL = 3, 6

def prepare(seed, where):
    (where / "made").write_text(str(seed))
    with open(r"{log}", "a") as log:
        print("start", file=log)

def case(seed, index, where):
    with open(r"{log}", "a") as log:
        print(index, file=log)
    if (shared(where) / "made").read_text() != str(seed) or list(where.iterdir()):
        raise Broken("not prepared")
    if index == 3:
        raise Broken("it was three")
    if index == 4:
        raise OSError("a slip")
    if index == 5:
        run_kdctl(["presets"], where, hook=lambda: time.sleep(60), timeout=0.5)
    ended = run_kdctl(["presets", "show", "nowhere"] if index else ["presets"], where)
    if ended.code != (2 if index else 0) or "Traceback" in ended.err:
        raise Broken(str(ended))
    return "odd" if index % 2 else "even"

import time
'''


SEVERAL = "import json, sys; sys.path.insert(0, sys.argv[1]); import campaign\n"
SEVERAL += "for words in json.loads(sys.argv[2]): print('##', campaign.main(words))"


def campaigns(folder: Path, *lines: str) -> list[tuple[str, list[int]]]:
    """Run campaigns in one process; return what each printed, the exit code last, and the cases it ran."""
    part, log = folder / "dice.py", folder / "log"
    part.write_text(PART.replace("{log}", str(log)))
    words = [[str(part), *line.split()] for line in lines]
    command = [sys.executable, "-c", SEVERAL, str(CAMPAIGN.parent), json.dumps(words)]
    texts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("## ")
    ran = iter(log.read_text().split("start")[1:])
    return [(text + after[0], sorted(map(int, next(ran).split()))) for text, after in pairwise(texts)]


def test_broken_promises_are_printed_and_repeated_and_finished_cases_are_kept(tmp_path):
    state = tmp_path / "state.jsonl"
    short, rest, only, good = campaigns(
        tmp_path, f"--short --state {state}", f"--state {state}", "--only 3 --seed 7", "--only 2"
    )
    assert short[1] == [0, 1, 2]
    assert "even: 2" in short[0]
    assert short[0].endswith("0")

    assert rest[1] == [3, 4, 5]
    assert rest[0].endswith("1")
    assert "dice                  6        6        3  Three is never drawn." in rest[0]
    assert "dice 3: it was three" in rest[0]
    assert "--seed 0 --only 3" in rest[0]
    assert "OSError: a slip" in rest[0]
    assert "hangs: kdctl presets had not ended after 0 s" in rest[0]

    assert only[1] == [3]
    assert only[0].endswith("1")
    assert "--seed 7 --only 3" in only[0]
    assert good[0].endswith("0")
    assert {json.loads(line)["case"]["index"] for line in state.read_text().splitlines()} == set(range(6))


def test_the_short_campaign_breaks_no_promise():
    found = subprocess.run([sys.executable, str(CAMPAIGN), "--short"], capture_output=True, text=True)
    assert found.returncode == 0, f"{found.stdout}\n{found.stderr}"


def test_no_process_outlives_a_campaign_that_is_killed(tmp_path):
    part = tmp_path / "sleeper.py"
    part.write_text(f'"""Sleeps."""\nSHORT = FULL = 1\ndef case(seed, index, where):\n    import os, time\n'
                    f'    open(r"{tmp_path}/pid", "w").write(str(os.getpid()))\n    time.sleep(60)\n')  # fmt: skip
    process = subprocess.Popen([sys.executable, str(CAMPAIGN), str(part)])
    until = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pid = int((tmp_path / "pid").read_text())
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the case outlived the campaign")
