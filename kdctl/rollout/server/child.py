"""A server that kdctl starts and owns: on a free port, waited for, and ended with the work, however that ends."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from kdctl.base.errors import ServerError
from kdctl.base.progress import Reporter
from kdctl.config.preset import Form
from kdctl.rollout.server import keeper
from kdctl.rollout.server.refresh import filled
from kdctl.run.files import make_folder, open_new, remove

HOST = "127.0.0.1"
COMMANDS = {
    "vllm": "vllm serve {weights} --host 127.0.0.1 --port {port} --generation-config vllm",
    "sglang": "python -m sglang.launch_server --model-path {weights} --host 127.0.0.1 --port {port} "
    "--sampling-defaults openai",
    "llama-server": "llama-server --model {weights} --host 127.0.0.1 --port {port} --parallel 8 --ctx-size 0",
}
"""How each server that has a name is started."""
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}
"""What lets a server of our own take new weights."""
LAUNCHER = re.compile(r"(TORCHELASTIC|ACCELERATE|FSDP|MASTER|GROUP|ROLE)_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$")
START_S = 900.0
"""Seconds that a server may take to load its weights."""
LOOK_S = 0.5
END_S = keeper.PATIENCE_S + 5
LAST_LINES = 6
ERROR = re.compile(r"\w*(Error|Exception|error): .{1,500}|error loading model .{1,500}: .{1,500}")


class Child:
    """One server. log: the file that takes what it prints."""

    def __init__(self, command: str, log: Path, reporter: Reporter):
        self.command = COMMANDS.get(command, command)
        self.log, self.reporter = log, reporter
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def form(self) -> Form:
        """Return how the server takes weights, by what it is."""
        gguf = any(re.match(r"llama.*server", Path(word).name) for word in self.command.split())
        return "gguf" if gguf else "packed"

    def start(self, weights: Path) -> str:
        """Start the server with some weights, wait until it answers and return its address.

        Raises ServerError if its program is not there, or if it ends or stays silent.
        """
        port = free_port()
        words = filled(self.command, weights, port)
        if shutil.which(words[0]) is None:
            raise ServerError(
                f"the server's command needs the program {words[0]!r}, which is not on the PATH; install it, or give "
                "the whole command, with {port} and {weights} in it"
            )
        make_folder(self.log.parent)
        remove(self.log)
        with open_new(self.log) as log:
            self._keeper = subprocess.Popen(
                [sys.executable, keeper.__file__, *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
        url = f"http://{HOST}:{port}"
        with self.reporter.task(f"starting {Path(words[0]).name}"):
            self._wait(url, words)
        return url

    def _wait(self, url: str, words: list[str]) -> None:
        until = time.monotonic() + START_S
        while not _healthy(url):
            ended = self._keeper is None or self._keeper.poll() is not None
            if ended or time.monotonic() > until:
                why = "ended before it answered" if ended else f"did not answer in {START_S:.0f} s"
                self.stop()
                raise ServerError(
                    f"the server {why}: {shlex.join(words)}; it said, in {self.log}: {self._last_words()}"
                )
            time.sleep(LOOK_S)

    def restart(self, weights: Path) -> str:
        """End the server and start it with other weights; return its new address."""
        self.stop()
        return self.start(weights)

    def stop(self) -> None:
        """End the server and everything that it started."""
        running, self._keeper = self._keeper, None
        if running is None or running.stdin is None:
            return
        running.stdin.close()
        try:
            running.wait(END_S)
        except subprocess.TimeoutExpired:
            running.kill()

    def _last_words(self) -> str:
        """Return the first error of the log, which is the cause of those behind it, or its end."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        cause = next((found[0] for line in lines if (found := ERROR.search(line))), None)
        return cause or " | ".join(line.strip() for line in lines[-LAST_LINES:] if line.strip())[-600:] or "nothing"


def _environment() -> dict[str, str]:
    """Return the environment without what a launcher of several processes set in it, which is not for a server."""
    return {name: value for name, value in os.environ.items() if not LAUNCHER.match(name)} | ENVIRONMENT


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]


def _healthy(url: str) -> bool:
    """Tell whether a server has loaded its weights; vLLM, SGLang and llama-server all have this page."""
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
