"""One sweep a folder, one process a stage; the dead hold nothing."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kdctl.base.errors import StoreError
from kdctl.run.locks import holding
from kdctl.sweep.locks import only_sweep

HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from kdctl.sweep.locks import only_sweep\n"
    "with only_sweep(Path(sys.argv[1]), *sys.argv[2:]):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


@contextmanager
def held_elsewhere(folder: Path, *names: str) -> Iterator[subprocess.Popen[str]]:
    """Hold a folder in another process."""
    command = [sys.executable, "-c", HOLD, str(folder), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    """Return the folder of a run's locks."""
    return tmp_path / "run" / "sweeps" / "locks"


@pytest.mark.parametrize("mine", ["a", "b"])
def test_a_second_sweep_is_refused_and_told_who_holds_the_folder(locks: Path, mine: str) -> None:
    with held_elsewhere(locks, "a") as process:
        with pytest.raises(StoreError) as caught, only_sweep(locks, mine):
            raise AssertionError("two sweeps at once")
        said = str(caught.value)
        for part in ("sweep a", str(locks.parent.parent), f"process {process.pid}", socket.gethostname(), "since 20"):
            assert part in said


def test_the_lock_of_a_process_that_was_killed_is_free(locks: Path) -> None:
    with held_elsewhere(locks, "a") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with only_sweep(locks, "a"):
            assert f'"pid": {os.getpid()}' in (locks / "a.lock").read_text()


def test_shards_of_one_sweep_share_a_folder_and_a_shard_runs_once(locks: Path) -> None:
    with held_elsewhere(locks, "a", "0-of-2"), ExitStack() as stack:
        stack.enter_context(only_sweep(locks, "a", "1-of-2"))
        with pytest.raises(StoreError, match="shard 0-of-2 of sweep a"), only_sweep(locks, "a", "0-of-2"):
            raise AssertionError("one shard twice")
        with pytest.raises(StoreError, match="sweep a runs"), only_sweep(locks, "b"):
            raise AssertionError("two sweeps at once")


def test_an_old_lock_that_another_shard_is_just_looking_at_does_not_refuse_a_sweep(locks: Path) -> None:
    held, release = threading.Event(), threading.Event()

    def look() -> None:
        with holding(locks / "old.lock", "old", print):
            held.set()
            release.wait()

    looking = threading.Thread(target=look)
    looking.start()
    held.wait()
    threading.Timer(0.2, release.set).start()
    with only_sweep(locks, "a", "1-of-2"):
        assert release.is_set()
    looking.join()
