"""Runs kdctl in children of a process that has imported everything: a run costs its work, not seconds of imports.

The process itself runs no tensor work and has one thread, so that it can be forked at any moment. A child ends as an
interpreter does: hooks of uncaught exceptions, threads and functions registered with ``atexit`` included.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from parts.base import Broken

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "PYTHONPATH": str(ROOT),
    "PYTHONUTF8": "1",
}
LAZY = ("transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama", "datasets")
LAZY += ("lm_eval.models.huggingface", "hqq.core.quantize", "gguf", "matplotlib.pyplot", "optuna", "pandas")
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Ended:
    """How a run ended. code: the exit code, or the negative number of the signal that ended it."""

    code: int
    out: str
    err: str
    seconds: float


def warm_up(home: Path) -> None:
    """Import kdctl and all that it imports later. home: what libraries may take for the user's own cache."""
    os.environ.update(SETTINGS)
    os.environ.setdefault("HF_HOME", str(home / "huggingface"))
    Path(os.environ["HF_HOME"]).mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    import kdctl.model  # before transformers, which else imports hqq's cache

    for module in pkgutil.walk_packages(kdctl.__path__, "kdctl."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in LAZY:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    gc.collect()
    gc.freeze()


@dataclass
class Running:
    """A child at work, in a process group of its own, which dies with this process."""

    pid: int
    started: float
    out: IO[bytes]
    err: IO[bytes]
    what: str
    handle: int = field(init=False)
    code: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.handle = os.pidfd_open(self.pid)

    def alive(self, seconds: float = 0.0) -> bool:
        """Wait at most so long for the end; tell whether it still runs."""
        if self.code is None and select.select([self.handle], [], [], max(0.0, seconds))[0]:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self.handle)
        return self.code is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the child and all that it started."""
        if self.alive():
            os.killpg(self.pid, number)

    def wait(self, timeout: float = TIMEOUT_S) -> Ended:
        """Wait for the end. Raises Broken for a hang, after killing it."""
        left = self.started + timeout - time.monotonic()
        hangs = self.alive(left)
        if hangs:
            self.kill()
            self.alive(60.0)
        seconds = time.monotonic() - self.started
        out, err = _text(self.out), _text(self.err)
        if hangs:
            raise Broken(f"hangs: {self.what} had not ended after {timeout:.0f} s; it had written {err[-2000:]!r}")
        assert self.code is not None
        return Ended(self.code, out, err, seconds)


def start(work: Callable[[], None], cwd: Path, env: Mapping[str, str | None] | None = None, what: str = "") -> Running:
    """Start a function in a child that has its own working directory, environment, output and process group.

    env: variables to set, or to remove where None.
    """
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - read when the child has ended
    sys.stdout.flush()
    sys.stderr.flush()
    ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        _live(work, cwd, env or {}, (out.fileno(), err.fileno()), ready)
    os.close(ready[1])
    os.read(ready[0], 1)  # the child leads its group
    os.close(ready[0])
    return Running(pid, time.monotonic(), out, err, what or repr(work))


def start_kdctl(
    argv: Sequence[str],
    cwd: Path,
    *,
    env: Mapping[str, str | None] | None = None,
    hook: Callable[[], None] | None = None,
) -> Running:
    """Start ``kdctl ARGV``; converted models are cached in ``cwd/cache`` unless ``env`` says where."""

    def work() -> None:
        sys.argv = ["kdctl", *argv]
        if hook is not None:
            hook()
        from kdctl.cli.boundary import main

        main()

    return start(work, cwd, {"KDCTL_CACHE": str(cwd / "cache"), **(env or {})}, "kdctl " + " ".join(argv))


def run_kdctl(
    argv: Sequence[str],
    cwd: Path,
    *,
    env: Mapping[str, str | None] | None = None,
    kill_after: float | None = None,
    hook: Callable[[], None] | None = None,
    timeout: float = TIMEOUT_S,
) -> Ended:
    """Run ``kdctl ARGV`` to its end, or to SIGKILL after so many seconds. Raises Broken for a hang.

    hook: called in the child before kdctl.
    """
    running = start_kdctl(argv, cwd, env=env, hook=hook)
    if kill_after is not None and running.alive(kill_after):
        running.kill()
    return running.wait(timeout)


def in_child(work: Callable[[], Any], cwd: Path, timeout: float = TIMEOUT_S) -> Any:
    """Return what a function returns, made in a child: anything that JSON holds. Raises Broken as it does there."""
    with tempfile.NamedTemporaryFile("w+", encoding="utf-8") as answer:

        def told() -> None:
            try:
                found = {"value": work()}
            except Broken as error:
                found = {"broken": str(error)}
            Path(answer.name).write_text(json.dumps(found), encoding="utf-8")

        ended = start(told, cwd).wait(timeout)
        text = answer.read()
    if ended.code or not text:
        raise Broken(f"a fault of the case itself, exit code {ended.code}:\n{ended.err[-4000:]}")
    found = json.loads(text)
    if "broken" in found:
        raise Broken(found["broken"])
    return found["value"]


def _text(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode("utf-8", "replace")


def _live(
    work: Callable[[], None],
    cwd: Path,
    env: Mapping[str, str | None],
    files: tuple[int, int],
    ready: tuple[int, int],
) -> None:
    """Be the child, to its end."""
    code = 70
    try:
        os.setpgid(0, 0)
        _die_with_parent()
        vars(weakref.finalize)["_registry"].clear()  # the parent's temporary folders are not this child's to remove
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(files, 1):
            os.dup2(file, number)
        for end in ready:
            os.close(end)
        os.chdir(cwd)
        for name, value in env.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        code = _end(work)
    finally:
        os._exit(code)


def _end(work: Callable[[], None]) -> int:
    """Run a function as an interpreter runs a script, and return the exit code."""
    code = 0
    try:
        work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException as error:  # noqa: BLE001 - an interpreter lets none through
        sys.excepthook(type(error), error, error.__traceback__)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    vars(threading)["_shutdown"]()
    vars(atexit)["_run_exitfuncs"]()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the one that forked it ends."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
