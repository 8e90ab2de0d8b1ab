"""Signals as a process gets them: what asks, what ends, and with which exit code."""

import signal
import subprocess
import sys
import time

import pytest

BEGIN = """
import sys, time
from kdctl.base import stopping

stopping.AGAIN_S, stopping.GRACE_S, stopping.ONE_REQUEST_S = 0.1, 0.5, 0.4
stopping.listen(lambda ended: say(f"outside {ended}"))

def say(word):
    print(word, flush=True)

def until(what):
    while not what():
        time.sleep(0.01)

try:
    BODY
except KeyboardInterrupt as ended:
    stopping.notice()
    say(ended)
    sys.exit(ended.code)
"""
STEPS = """
    with stopping.put_off():
        say("ready")
        until(stopping.asked)
        say("asked")
        time.sleep(1)
        stopping.preempt("after step 3")
"""


def started(body: str) -> "subprocess.Popen[str]":
    """Start a process that listens and runs a body, and wait until it says that it is ready."""
    code = BEGIN.replace("    BODY", body)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    """Wait for the end; return the exit code and what was said since the process was ready."""
    out, _ = process.communicate(timeout=20)
    return process.returncode, out.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_is_put_off_asks_and_no_clock_runs(number: signal.Signals) -> None:
    process = started(STEPS)  # the second that the step takes is twice the time after which others end from outside
    process.send_signal(number)
    assert ended(process) == (75, ["asked", f"stopped by {number.name} after step 3"])


def test_a_launcher_that_passes_on_what_its_group_was_sent_asks_once() -> None:
    process = started(STEPS)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert ended(process)[0] == 75
    process = started(STEPS)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.6)
    process.send_signal(signal.SIGTERM)  # the end of the time that SIGUSR1 told of
    assert ended(process)[0] == 75


@pytest.mark.parametrize(("second", "after"), [(signal.SIGTERM, 0.5), (signal.SIGINT, 0.0)])
def test_a_second_request_and_ctrl_c_end_at_once(second: signal.Signals, after: float) -> None:
    process = started(STEPS)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    time.sleep(after)
    process.send_signal(second)
    code, (said,) = ended(process)
    assert code == 128 + second
    assert said == ("stopped" if second == signal.SIGINT else "stopped by SIGTERM")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_nothing_is_put_off_elsewhere(number: signal.Signals) -> None:
    process = started('    say("ready")\n    time.sleep(20)')
    process.send_signal(number)
    assert ended(process) == (128 + number, [f"stopped by {number.name}"])


def test_a_block_that_ends_without_looking_ends_the_process() -> None:
    process = started('    with stopping.put_off():\n        say("ready")\n        time.sleep(1)\n    say("went on")')
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, ["stopped by SIGTERM"])


SWALLOWING = """
    def finish():
        with stopping.put_off():
            say("ready")
            until(stopping.asked)
            stopping.preempt("in time")

    while True:
        try:
            finish()
        except KeyboardInterrupt:
            finish = lambda: time.sleep(20)
"""


def test_what_hangs_after_it_was_preempted_is_ended_from_outside_with_its_code() -> None:
    process = started(SWALLOWING)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (75, ["outside stopped by SIGTERM in time"])


def test_what_an_agent_of_a_sweep_starts_ends_with_the_sweep_and_not_before() -> None:
    sweep = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = started(f'    stopping.end_with({sweep.pid})\n    say("ready")\n    time.sleep(20)')
    time.sleep(0.7)
    assert process.poll() is None
    sweep.kill()
    sweep.wait()
    assert ended(process) == (143, ["stopped by SIGTERM"])
