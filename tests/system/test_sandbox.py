"""Programs that nobody has read: what they cannot do, and which count as having run to their end."""

import socket
import sys
import time
from pathlib import Path

import pytest

from kdctl.base.errors import DataError
from kdctl.system import sandbox
from kdctl.system.sandbox import ends_well


@pytest.fixture(autouse=True, scope="module")
def _confines() -> None:
    """Leave out what needs a system that confines."""
    if sys.platform != "linux":
        pytest.skip("namespaces are Linux's")
    try:
        sandbox.check()
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("program", ["", "x = 1\nassert x == 1", "print('said')", "'é'.encode()"])
def test_a_program_that_ends_by_itself_ends_well(program: str) -> None:
    assert ends_well(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def broken(:",
        "raise SystemExit(0)",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import numpy",
        "x = bytearray(2**31)",
        "import os\nif os.fork() == 0:\n    pass",
    ],
)
def test_a_program_that_does_not_has_failed(program: str) -> None:
    assert not ends_well(program)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "input()\nwhile True: pass"])
def test_time_is_bounded(program: str) -> None:
    started = time.monotonic()
    assert not ends_well(program, seconds=1)
    assert time.monotonic() - started < 10


def test_no_file_can_be_written_or_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    kept.chmod(0o666)
    tmp_path.chmod(0o777)
    assert ends_well(f"assert open({str(kept)!r}).read() == 'mine'")
    for attempt in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"open('{tmp_path}/new', 'w')",
    ):
        assert not ends_well(attempt)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "mine"


def test_nothing_answers_on_the_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert not ends_well(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)")
        with pytest.raises(TimeoutError):
            server.accept()


def test_it_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCTL_SERVER_KEY", "secret")
    assert ends_well("import os; assert 'KDCTL_SERVER_KEY' not in os.environ")


def test_where_nothing_confines_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "refusing.py"
    told.write_text(f"import sys\nsys.stderr.write('unshare: not permitted')\nsys.exit({sandbox.confined.REFUSED})\n")
    monkeypatch.setattr(sandbox, "SCRIPT", told)
    with pytest.raises(DataError, match=r"give up network and files \(unshare: not permitted\)"):
        sandbox.check()
