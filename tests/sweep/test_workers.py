"""Workers run side by side, none outlives the sweep, and a failure is told with its last words."""

import signal
import sys
import time
from pathlib import Path

import pytest

from kdctl.base import stopping
from kdctl.base.errors import StoreError
from kdctl.sweep import workers
from kdctl.sweep.workers import run_workers


def python(code: str) -> list[str]:
    """Return a command that runs some code."""
    return [sys.executable, "-c", code]


def test_workers_run_at_the_same_time_and_leave_their_words(tmp_path: Path) -> None:
    meet = "import pathlib, sys, time\nfolder = pathlib.Path(sys.argv[1])\n(folder / sys.argv[2]).touch()\n"
    meet += "while len(list(folder.glob('here*'))) < 2: time.sleep(0.01)\nprint('met', sys.argv[2])"
    run_workers([[*python(meet), str(tmp_path), f"here{index}"] for index in range(2)], tmp_path / "logs")
    assert [(tmp_path / "logs" / f"worker-{index}.log").read_text() for index in range(2)] == [
        "met here0\n",
        "met here1\n",
    ]


def test_a_failure_is_told_after_the_others_have_finished(tmp_path: Path) -> None:
    done = tmp_path / "done"
    slow = python(f"import time, pathlib; time.sleep(0.3); pathlib.Path({str(done)!r}).touch()")
    failing = python("import sys; print('first'); print('error: no such model', file=sys.stderr); sys.exit(2)")
    with pytest.raises(StoreError) as caught:
        run_workers([failing, slow], tmp_path)
    assert done.exists()
    for part in ("worker 0 of 2 ended with 2", "error: no such model", "worker-0.log"):
        assert part in str(caught.value)


def test_no_worker_outlives_an_interrupted_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[workers.subprocess.Popen[bytes]] = []

    class Interrupted(workers.subprocess.Popen):
        def __init__(self, *arguments, **options):
            if started:
                raise KeyboardInterrupt
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(workers.subprocess, "Popen", Interrupted)
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_workers([python("import time; time.sleep(60)")] * 2, tmp_path)
    assert time.monotonic() - before < 30
    assert started[0].returncode is not None


def test_workers_of_a_sweep_that_is_to_stop_are_asked_once_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import pathlib, signal, sys, time\nasked = []\nsignal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
    code += f"pathlib.Path({str(tmp_path)!r}, sys.argv[1]).touch()\nwhile not asked: time.sleep(0.01)\n"
    code += "time.sleep(1)\nprint(len(asked))\nsys.exit(75)"
    monkeypatch.setattr(workers, "LONGEST_END_S", 0.1)
    monkeypatch.setattr(stopping, "_State", type("State", (stopping._State,), {}))
    monkeypatch.setattr(stopping, "asked", lambda: len(list(tmp_path.glob("here*"))) == 2)
    with pytest.raises(stopping.Preempted) as caught:
        run_workers([[*python(code), f"here{index}"] for index in range(2)], tmp_path / "logs")
    assert caught.value.code == 75
    assert [(tmp_path / "logs" / f"worker-{index}.log").read_text() for index in range(2)] == ["1\n", "1\n"]


@pytest.mark.parametrize(
    ("codes", "raised", "said"),
    [
        ((143, 0), stopping.Stopped, "SIGTERM"),
        ((75, 143), stopping.Stopped, "SIGTERM"),
        ((75, 2), StoreError, "with 2"),
    ],
)
def test_a_sweep_that_is_to_stop_says_how_its_workers_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, int], raised: type[BaseException], said: str
) -> None:
    lines = "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    lines += f"pathlib.Path({str(tmp_path)!r}, sys.argv[1]).touch()\ntime.sleep(0.5)\nsys.exit(int(sys.argv[2]))"
    monkeypatch.setattr(stopping, "_State", type("State", (stopping._State,), {"asked": signal.SIGTERM}))
    monkeypatch.setattr(stopping, "asked", lambda: len(list(tmp_path.glob("here*"))) == 2)
    with pytest.raises(raised, match=said):
        run_workers([[*python(lines), f"here{i}", str(code)] for i, code in enumerate(codes)], tmp_path / "logs")


@pytest.mark.parametrize(("named", "given"), [("3,5", ["3", "5", "3"]), ("7", ["7"] * 3), (None, ["none"] * 3)])
def test_workers_take_turns_on_the_gpus_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, given: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    run_workers([python("import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'none'))")] * 3, tmp_path)
    assert [(tmp_path / f"worker-{index}.log").read_text().strip() for index in range(3)] == given
