"""Keys that are sent and never said, and how long a busy server is waited for."""

import asyncio

import pytest

from kdctl.base.errors import ServerError
from kdctl.rollout.server import client
from kdctl.rollout.server.client import KEY, Client


def test_a_key_is_sent_without_the_end_of_its_line(monkeypatch):
    monkeypatch.setenv(KEY, "sk-1\n")
    assert Client("http://a", 1.0, 1)._http.headers["authorization"] == "Bearer sk-1"


@pytest.mark.parametrize("key", ["sk-\n1", "schlüssel"])
def test_a_key_that_cannot_be_one_is_refused_unsaid(monkeypatch, key):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(ServerError, match=r"KDCTL_SERVER_KEY holds characters that no key has") as error:
        Client("http://a", 1.0, 1)
    assert key not in str(error.value)


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)

    async def headers():
        async with Client("http://a", 1.0, 1) as one:
            return one._http.headers

    assert "authorization" not in asyncio.run(headers())


def test_waits_double_up_to_a_longest_and_are_never_shorter_than_asked_for():
    assert [client._wait(times) for times in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, client.LONGEST_WAIT_S]
    assert client._wait(1, "7") == 7.0
    assert client._wait(3, "0") == 2.0
    assert client._wait(1, "999") == client.LONGEST_WAIT_S
    assert client._wait(1, "soon") == 0.5
