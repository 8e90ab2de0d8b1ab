"""The command that gives servers new weights: its places, its end, and what it leaves running."""

import sys
import time
from pathlib import Path

import pytest

from kdctl.base.errors import ServerError
from kdctl.base.progress import Silent
from kdctl.rollout.server import refresh
from kdctl.rollout.server.refresh import filled, run_command


def test_places_are_filled_within_words():
    words = filled("serve '{weights}' --port={port} -x", Path("/a b/c"), 12)
    assert words == ["serve", "/a b/c", "--port=12", "-x"]


def test_what_it_leaves_running_is_not_waited_for(tmp_path):
    started = time.monotonic()
    run_command("sh -c 'sleep 20 & echo {weights}'", tmp_path, Silent())
    assert time.monotonic() - started < 10


def test_what_it_said_is_said_whatever_bytes_it_was(tmp_path):
    code = "import sys; sys.stdout.buffer.write(b'no \\\\xff unit'); sys.exit(3)"
    with pytest.raises(ServerError, match=r"ended with 3 \(no . unit\)"):
        run_command(f'{sys.executable} -c "{code}" {{weights}}', tmp_path, Silent())


def test_one_that_is_not_there_or_does_not_end(tmp_path, monkeypatch):
    with pytest.raises(ServerError, match=r"cannot be run: .*no-such-command"):
        run_command("no-such-command {weights}", tmp_path, Silent())
    monkeypatch.setattr(refresh, "LONGEST_S", 0.2)
    with pytest.raises(ServerError, match="did not end in 0 s"):
        run_command("sleep 20", tmp_path, Silent())
