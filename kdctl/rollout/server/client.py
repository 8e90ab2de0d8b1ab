"""Requests to one server: bounded in time, repeated where it is busy or away, and errors that say what it answered."""

import asyncio
import os
from typing import Any

import httpx

from kdctl.base.errors import ServerError, brief

KEY = "KDCTL_SERVER_KEY"
"""Environment variable with the key that servers ask for; it is written nowhere."""
BUSY = (429, 502, 503, 504)
AWAY = 4
"""Times that a server which does not answer is asked again."""
PATIENCE = 9
"""Times that a server which says that it is busy is asked again."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
CONNECT_S = 10.0


class Gone(Exception):
    """A server does not answer any more; others may."""


class Refused(Exception):
    """A server answers a request with an error, which asking again does not change. status: of HTTP."""

    def __init__(self, status: int, said: str):
        super().__init__(f"HTTP {status}: {said}")
        self.status = status


class Client:
    """One server, as seen from inside a running event loop. width: requests at once."""

    def __init__(self, url: str, timeout_s: float, width: int):
        self.url = url
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and (key.isprintable())):
            raise ServerError(f"the environment variable {KEY} holds characters that no key has; set it again")
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s), pool=None),
            limits=httpx.Limits(max_connections=width, max_keepalive_connections=width),
            trust_env=False,
        )

    async def __aenter__(self) -> "Client":
        """Enter the block in which requests are made."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections, also those that wait for an answer."""
        await self._http.aclose()

    async def get(self, path: str) -> Any:
        """Ask for a page and return its JSON. Raises Gone and Refused."""
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: Any) -> Any:
        """Send JSON and return the answer's. Raises Gone and Refused."""
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: Any) -> Any:
        """Ask again while a server is busy or away, waiting twice as long each time."""
        away = busy = 0
        while True:
            try:
                answer = await self._http.request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                away += 1
                if away > AWAY or isinstance(error, httpx.ReadTimeout):
                    raise Gone(f"{type(error).__name__}: {brief(error)}") from None
                await asyncio.sleep(_wait(away))
                continue
            if answer.status_code in BUSY and busy < PATIENCE:
                busy += 1
                await asyncio.sleep(_wait(busy, answer.headers.get("retry-after")))
                continue
            return _content(answer)


def _wait(times: int, asked: str | None = None) -> float:
    """Return how long to wait, seconds: as long as the server asks for, else twice as long each time."""
    least = float(asked) if asked is not None and asked.isdecimal() else 0.0
    return min(max(least, FIRST_WAIT_S * 2 ** (times - 1)), LONGEST_WAIT_S)


def _content(answer: httpx.Response) -> Any:
    """Return the JSON of an answer; some pages have none."""
    if answer.status_code in BUSY:
        raise Gone(f"HTTP {answer.status_code}: {_said(answer)}")
    if answer.status_code >= 400:
        raise Refused(answer.status_code, _said(answer))
    if not answer.content:
        return None
    try:
        return answer.json()
    except ValueError:
        return answer.text


def _said(answer: httpx.Response) -> str:
    """Return what an error says, whatever each server wraps it in."""
    try:
        found = answer.json()
    except ValueError:
        found = answer.text
    while isinstance(found, dict):
        found = next((found[name] for name in ("error", "message", "detail") if found.get(name)), str(found))
    return " ".join(str(found).split())[:300] or "no reason given"
