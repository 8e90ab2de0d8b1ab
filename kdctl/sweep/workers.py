"""Runs several shards of a sweep as processes of their own on one machine."""

import os
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from kdctl.base import stopping
from kdctl.base.errors import StoreError
from kdctl.run.files import make_folder, open_new

LONGEST_END_S = 6.0
LOOK_S = 0.2
STOPPED = {128 + signal.SIGTERM, -signal.SIGTERM}
"""Codes of a worker that SIGTERM ended where nothing trained; the negative one before kdctl could listen."""


def run_workers(commands: Sequence[Sequence[str]], logs: Path) -> None:
    """Run commands side by side until all have ended.

    What a worker prints goes to a file in ``logs``. No worker outlives this call. Raises StoreError with the last line
    of a worker that failed, after the others have finished, and Preempted once all have ended because this process was
    asked to stop.
    """
    make_folder(logs)
    files = [open_new(logs / f"worker-{index}.log") for index in range(len(commands))]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for index, command in enumerate(commands):
            places = _places(index, len(commands))
            with stopping.held():  # a worker that was started and is not in the list would outlive this call
                workers.append(subprocess.Popen(command, stdout=files[index], stderr=subprocess.STDOUT, env=places))
        with stopping.put_off():
            _wait(workers, logs)
    finally:
        _end(workers)
        for file in files:
            file.close()
    _check(workers, logs)


def _wait(workers: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
    """Wait for every worker to end, which they are asked to once this process is.

    Raises Preempted if all that trained wrote a checkpoint then; a worker that failed is told of first.
    """
    told = False
    while any(worker.poll() is None for worker in workers):
        if stopping.asked() and not told:
            for worker in workers:
                worker.terminate()
            told = True
        time.sleep(LOOK_S)
    codes = {worker.returncode for worker in workers}
    if stopping.asked() and codes - {0, stopping.LATER, *STOPPED}:
        _check(workers, logs, {stopping.LATER, *STOPPED})
    if stopping.asked() and stopping.LATER in codes and not codes & STOPPED:
        stopping.preempt("together with its trials")


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask every worker to end, and see to it."""
    stopping.notice()
    for worker in workers:
        worker.terminate()
    latest = time.monotonic() + LONGEST_END_S
    for worker in workers:
        try:
            worker.wait(timeout=max(0.0, latest - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _places(index: int, count: int) -> dict[str, str]:
    """Return a worker's environment: its share of the CPU cores, and one of the GPUs that are named, in turn."""
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, stopping.PARENT: str(os.getpid())}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return environment | ({"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if len(gpus) > 1 else {})


def _check(workers: Sequence[subprocess.Popen[bytes]], logs: Path, expected: Collection[int] = ()) -> None:
    for index, worker in enumerate(workers):
        if worker.returncode not in {0, *expected}:
            log = logs / f"worker-{index}.log"
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"])[-1]
            raise StoreError(
                f"worker {index} of {len(workers)} ended with {worker.returncode} and said {last!r} (all of it is in "
                f"{log}); what was finished is on disk, and the same command goes on from there"
            )
