"""Surroundings of a call into lm-eval: quiet, counted, and without long waits for the Hub.

Everything that is changed here belongs to other libraries, and is put back when the block ends.
"""

import logging
import socket
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import datasets
import huggingface_hub.constants
import huggingface_hub.utils
import lm_eval.api.task
from lm_eval.api.model import CacheHook
from lm_eval.api.task import Task
from tqdm import tqdm

from kdctl.system.patches import hub_offline, replaced

LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "transformers", "accelerate")
PROBE_TIMEOUT_S = 3.0


class Meter(CacheHook):
    """Counts the answers that lm-eval offers to a cache of answers, which kdctl does not keep."""

    def __init__(self, task: Task, report: Callable[[float], None], repeats: int = 1):
        super().__init__(None)
        self.task = task
        self.repeats = repeats
        self.report = report
        self.answered = 0

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Report the share of the task's requests that is answered."""
        self.answered += 1
        self.report(self.answered / len(self.task.instances) / self.repeats)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log messages, warnings and bars of lm-eval and of the Hugging Face libraries."""
    with ExitStack() as stack:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        for library in (datasets, huggingface_hub.utils):
            if not library.are_progress_bars_disabled():
                stack.callback(library.enable_progress_bars)
                library.disable_progress_bars()
        stack.enter_context(replaced(lm_eval.api.task, "tqdm", _hidden_bar))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def _hidden_bar(*args: Any, **options: Any) -> tqdm:
    """Make a bar that shows nothing."""
    return tqdm(*args, **{**options, "disable": True})


@contextmanager
def hub_access(offline: bool) -> Iterator[str]:
    """Yield what keeps the Hub from being asked, or nothing; where it is not asked, local caches answer at once.

    Without this, huggingface_hub retries for half a minute and more before it says that there is no network.
    """
    obstacle = "offline mode is on" if offline else "" if hub_reachable() else "the Hugging Face Hub cannot be reached"
    with hub_offline(bool(obstacle)):
        yield obstacle


def hub_reachable() -> bool:
    """Try to connect to the Hub's host; with a proxy, leave finding out to huggingface_hub."""
    address = urlsplit(huggingface_hub.constants.ENDPOINT)
    if not address.hostname or urllib.request.getproxies().keys() & {address.scheme, "all"}:
        return True
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True
