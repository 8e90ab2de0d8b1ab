"""One process makes a result, the others wait and say for whom; the dead hold nothing."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kdctl.run.locks import Busy, Use, holding

MAKE = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from kdctl.run.locks import holding\n"
    "made = Path(sys.argv[1]) / 'made'\n"
    "with holding(made.parent / '.locks' / 'it.lock', 'it', print):\n"
    "    time.sleep(float(sys.argv[2]))\n"
    "    made.write_text(made.read_text() + '.' if made.exists() else '.')\n"
)


def test_a_result_is_made_by_one_process_at_a_time(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", MAKE, str(tmp_path), "0.2"]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "..."


def test_who_waits_says_once_for_whom_and_the_lock_of_the_dead_is_free(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", MAKE, str(tmp_path), "60"])
    lock, said = tmp_path / ".locks" / "it.lock", []

    def say(text: str) -> None:
        said.append(text)
        other.kill()

    while not lock.exists() or not lock.read_text():
        assert other.poll() is None
    with pytest.raises(Busy, match=str(other.pid)), holding(lock, "it", print, 0.1):
        raise AssertionError("two at once")
    with holding(lock, f"it in {tmp_path}", say):
        assert str(os.getpid()) in lock.read_text()
    other.wait()
    (text,) = said
    for part in (f"process {other.pid} on {socket.gethostname()} (since ", f"is at work on it in {tmp_path}"):
        assert part in text


def test_a_folder_has_a_sole_user_once_the_others_are_gone(tmp_path: Path) -> None:
    lock = tmp_path / ".locks" / "open.lock"
    mine, other = Use(lock), Use(lock)
    assert not mine.sole()
    del other
    assert mine.sole()
    (tmp_path / "file").touch()
    assert not Use(tmp_path / "file" / "open.lock").sole()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_volume_without_locks_gives_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with holding(tmp_path / "it.lock", "it", said.append):
        pass
    assert [os.strerror(number) in text for text in said] == [True]


def test_where_nothing_can_be_written_nothing_is_guarded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with holding(tmp_path / "file" / "it.lock", "it", print):
        pass
