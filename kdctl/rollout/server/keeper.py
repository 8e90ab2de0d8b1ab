"""Runs a command as long as somebody holds the other end of its standard input; started as a file, imports no kdctl.

However kdctl ends, also by a signal that it cannot see, its end of the pipe closes. Then the command's whole process
group is asked to end, and made to after a while.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE_S = 10.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def main() -> int:
    """Run the command of the arguments and return its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    server = subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_default_signals
    )
    threading.Thread(target=_end_at_last, args=(server.pid,), daemon=True).start()
    code = server.wait()
    _kill(server.pid, signal.SIGKILL)  # what it started itself
    return code if code >= 0 else 128 - code


def _default_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _end_at_last(group: int) -> None:
    """Wait until nobody holds the pipe any more, and end the process group."""
    while os.read(0, 1024):
        pass
    _kill(group, signal.SIGTERM)
    time.sleep(PATIENCE_S)
    _kill(group, signal.SIGKILL)


def _kill(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main())
