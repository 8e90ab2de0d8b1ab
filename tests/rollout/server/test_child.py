"""A server of our own: started, waited for, and gone whatever happens to who started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kdctl.base.errors import ServerError
from kdctl.base.progress import Silent
from kdctl.rollout.server import child, keeper
from kdctl.rollout.server.child import Child, free_port

HEALTHY = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("inner", inner.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path):
    """Return the command of a server that starts a process of its own."""
    script = tmp_path / "server.py"
    script.write_text(HEALTHY)
    return f"{sys.executable} {script} {{port}} {{weights}}"


def inner(log):
    """Return the number of the process that the server started."""
    return int(log.read_text().split()[1])


def gone(pid, seconds=5.0):
    """Tell whether a process ends within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(child, "LOOK_S", 0.05)


def test_it_is_started_waited_for_and_ended_with_what_it_started(command, tmp_path):
    one = Child(command, tmp_path / "log" / "server.log", Silent())
    url = one.start(tmp_path)
    assert url.startswith("http://127.0.0.1:")
    pid = inner(one.log)
    assert psutil.pid_exists(pid)
    other = one.restart(tmp_path)
    assert gone(pid)
    assert other != url or psutil.pid_exists(inner(one.log))
    one.stop()
    assert gone(inner(one.log))
    one.stop()


def test_one_that_ends_at_once_is_said_with_the_cause(tmp_path):
    script = "raise RuntimeError('no kernel for this shape')"
    one = Child(f'{sys.executable} -c "{script}" {{port}} {{weights}}', tmp_path / "server.log", Silent())
    with pytest.raises(
        ServerError, match=r"ended before it answered.*server\.log: RuntimeError: no kernel for this sh"
    ):
        one.start(tmp_path)


def test_one_that_stays_silent_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "START_S", 0.5)
    script = "import os, time; print('inner', os.getpid(), flush=True); time.sleep(600)"
    one = Child(f'{sys.executable} -c "{script}" {{port}} {{weights}}', tmp_path / "server.log", Silent())
    with pytest.raises(ServerError, match="did not answer in 0 s"):
        one.start(tmp_path)
    assert gone(inner(one.log))


def test_a_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ServerError, match=r"needs the program 'no-such-server'.*\{port\} and \{weights\}"):
        Child("no-such-server {port} {weights}", tmp_path / "log", Silent()).start(tmp_path)


OWNER = """
import sys, time
from pathlib import Path
from kdctl.base.progress import Silent
from kdctl.rollout.server.child import Child
Child(sys.argv[1], Path(sys.argv[2]), Silent()).start(Path("."))
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_who_started_it(command, tmp_path, number):
    log = tmp_path / "server.log"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, command, str(log)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "started\n"
    pid = inner(log)
    os.kill(owner.pid, number)
    owner.wait()
    assert gone(pid)


def test_a_server_that_does_not_want_to_end_is_made_to(tmp_path, monkeypatch):
    script = "import os, signal, time; signal.signal(15, 1); print('inner', os.getpid(), flush=True); time.sleep(600)"
    log = tmp_path / "log"
    short = tmp_path / "keeper.py"
    short.write_text(Path(keeper.__file__).read_text().replace("PATIENCE_S = 10.0", "PATIENCE_S = 0.3"))
    with open(log, "wb") as out:
        kept = subprocess.Popen(
            [sys.executable, short, sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=out
        )
    while not log.read_text().endswith("\n"):
        time.sleep(0.02)
    assert kept.stdin is not None
    kept.stdin.close()
    assert gone(inner(log))
    assert kept.wait(5) == 128 + signal.SIGKILL


def test_free_ports_can_be_listened_on():
    assert 1024 < free_port() < 65536
