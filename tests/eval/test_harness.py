"""Quiet, and no long waits for the Hub."""

import logging
import socket
import warnings
from types import SimpleNamespace
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import lm_eval.api.task
import pytest
from tqdm import tqdm

from kdctl.eval.harness import Meter, hub_access, hub_reachable, quiet


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def endpoint(monkeypatch, port: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")


def test_hub_is_reachable_where_something_listens(monkeypatch, no_proxy, listening):
    endpoint(monkeypatch, listening)
    assert hub_reachable()


def test_hub_is_not_reachable_where_nothing_listens(monkeypatch, no_proxy):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    endpoint(monkeypatch, port)
    assert not hub_reachable()


def test_a_proxy_is_trusted(monkeypatch):
    endpoint(monkeypatch, 9)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"http": "http://proxy:3128"})
    assert hub_reachable()


@pytest.mark.parametrize(("offline", "reachable", "obstacle"), [(False, True, ""), (True, True, "offline mode is on")])
def test_caches_answer_at_once_where_the_hub_is_not_asked(monkeypatch, offline, reachable, obstacle):
    monkeypatch.setattr("kdctl.eval.harness.hub_reachable", lambda: reachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    with hub_access(offline) as found:
        assert found == obstacle
        assert huggingface_hub.constants.HF_HUB_OFFLINE == datasets.config.HF_HUB_OFFLINE == bool(obstacle)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_quiet_hides_messages_warnings_and_bars_and_puts_all_back(capfd):
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with quiet():
        logging.getLogger("lm_eval.anything").warning("hidden")
        warnings.warn("hidden", stacklevel=1)
        assert list(lm_eval.api.task.tqdm([1, 2])) == [1, 2]
        assert datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")
    assert lm_eval.api.task.tqdm is tqdm
    assert logger.level == level
    assert not datasets.are_progress_bars_disabled()


def test_quiet_puts_all_back_after_an_error():
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert lm_eval.api.task.tqdm is tqdm


def test_meter_reports_the_share_answered():
    task: Any = SimpleNamespace(instances=[1, 2, 3, 4])
    shares = []
    meter = Meter(task, shares.append)
    for _ in range(4):
        meter.add_partial("loglikelihood", ("context", "continuation"), (0.0, True))
    assert shares == [0.25, 0.5, 0.75, 1.0]
