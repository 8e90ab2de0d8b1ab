"""Programs that nobody has read: what they cannot do, and which count as having run to their end."""

import os
import socket
import subprocess
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


FORGED = """
import os
for fd in range(64):
    try:
        os.write(fd, b"ready" + bytes([10]) + b"x" * 99)
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def broken(:",
        "raise SystemExit(0)",
        "import sys; sys.exit(97)",
        "import os; os._exit(0)",
        "import numpy",
        "x = bytearray(2**31)",
        FORGED,
        "import os\nwhile True: os.write(3, b'x' * 2**20)",
    ],
)
def test_a_program_that_does_not_has_failed(program: str) -> None:
    assert not ends_well(program)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "input()\nwhile True: pass"])
def test_time_is_bounded(program: str) -> None:
    started = time.monotonic()
    assert not ends_well(program, seconds=1)
    assert time.monotonic() - started < 10


def test_no_file_can_be_read_written_or_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    kept.chmod(0o666)
    tmp_path.chmod(0o777)
    attempts = (
        f"open({str(kept)!r}).read()",
        f"open({str(kept)!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"open('{tmp_path}/new', 'w')",
        "open('/new', 'w')",
        "import os; os.mkdir('/new')",
        f"open({str(Path(sandbox.__file__))!r})",
        "open('/etc/passwd')",
        "open('/dev/null')",
        "open('/proc/self/status')",
        "import os; os.write(os.memfd_create('m'), b'x' * 2**20)",
    )
    assert not any(map(ends_well, attempts))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "mine"


UNDONE = """
import ctypes, os
libc = ctypes.CDLL(None)
def tried(name, *values):
    return getattr(libc, name)(*values) == 0
attributes = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
assert not tried("syscall", 442, -100, b"/", 0x8000, attributes, 32)
assert not tried("unshare", 0x10000000)
assert not tried("unshare", 0x20000)
assert not tried("mount", b"none", b"/lib", b"tmpfs", 0, None)
assert not tried("umount2", b"/lib", 2)
assert not tried("chroot", b"/lib")
assert not tried("sethostname", b"x", 1)
"""


def test_what_was_given_up_cannot_be_got_back() -> None:
    assert ends_well(UNDONE)


def test_no_other_process_is_within_reach() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        everyone = f"[os.getppid(), {os.getpid()}, {bystander.pid}, -1]"
        program = f"""
import os, signal
assert os.getpid() == 1
for one in {everyone}:
    try:
        os.kill(one, signal.SIGKILL)
    except OSError:
        continue
    assert one in (0, -1)
"""
        ends_well(program)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_what_it_starts_ends_with_it() -> None:
    """Only root can start anything; a child of its own session that holds every file open delays nothing."""
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(86399)"
    started = time.monotonic()
    ends_well(program, seconds=5)
    assert time.monotonic() - started < 20
    assert b"86399" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, check=True).stdout


def test_sockets_of_other_programs_are_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        os.chmod(path, 0o777)
        assert not ends_well(f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})")


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


@pytest.mark.parametrize("last", ["print('unshare: not permitted', file=sys.stderr); sys.exit(1)", "time.sleep(60)"])
def test_where_nothing_confines_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    told = tmp_path / "refusing.py"
    told.write_text(f"import sys, time\n{last}\n")
    monkeypatch.setattr(sandbox, "SCRIPT", told)
    with pytest.raises(
        DataError, match=r"cannot confine a process \((unshare: not permitted|it did not start in time)\)"
    ):
        ends_well("", seconds=1)


def test_a_system_that_lets_nothing_end_well_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "ends_well", lambda _: False)
    with pytest.raises(DataError, match="one that does nothing does not end well in it"):
        sandbox.check()


def test_bounds_of_the_session_are_kept_where_they_are_lower() -> None:
    code = "from kdctl.system.sandbox import check; check()"
    limited = f"ulimit -t 8; exec {sys.executable} -c '{code}'"
    subprocess.run(["bash", "-c", limited], check=True, cwd=Path(__file__).resolve().parents[2])
