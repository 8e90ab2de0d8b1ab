"""Several servers that share the requests: each takes the next when it has room, and one that dies leaves its own."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import TypeVar

from kdctl.base.errors import ServerError
from kdctl.rollout.server.client import KEY, Client, Gone, Refused
from kdctl.rollout.server.llama import Llama
from kdctl.rollout.server.protocol import About, Server
from kdctl.rollout.server.sglang import Sglang
from kdctl.rollout.server.vllm import Vllm

T = TypeVar("T")
R = TypeVar("R")
KINDS: tuple[type[Server], ...] = (Vllm, Sglang, Llama)


class Dropped(Exception):
    """The one server that was asked does not answer any more, and others do."""


@dataclass(frozen=True)
class Place:
    """One server: where it is and what it speaks."""

    url: str
    server: Server
    about: About

    @property
    def described(self) -> str:
        """Say what it is, as in messages and manifests."""
        return f"{self.server.kind} {self.about.version} at {self.url}"


class Pool:
    """The servers that are alive. width: requests in the making at once, over all; say: told of one that is dropped."""

    def __init__(self, urls: Sequence[str], width: int, timeout_s: float, say: Callable[[str], None]):
        self.urls, self.width, self.timeout_s, self.say = [*urls], width, timeout_s, say
        self.places: list[Place] = []
        self.closed = False
        """Nobody waits for answers any more; those that are asked for come, and no other is asked."""

    def meet(self, patience_s: float = 0.0) -> list[Place]:
        """Find out what each server is; one that starts may take a while to answer.

        Raises ServerError for one that is away or that kdctl does not know.
        """
        until = time.monotonic() + patience_s
        while True:
            try:
                self.places = [asyncio.run(self._meet(url)) for url in self.urls]
            except ServerError:
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)
            else:
                return self.places

    async def _meet(self, url: str) -> Place:
        async with Client(url, self.timeout_s, 1) as client:
            try:
                for kind in KINDS:
                    if (about := await kind.recognise(client)) is not None:
                        return Place(url, kind(about), about)
            except Gone as error:
                raise ServerError(f"no server answers at {url} ({error}); start it, or correct the address") from None
            status = await _status(client)
        if status in (401, 403):
            raise ServerError(f"{url} asks for a key (HTTP {status}); set the environment variable {KEY} to it")
        names = ", ".join(kind.kind for kind in KINDS)
        raise ServerError(
            f"{url} answers like none of {names}, so kdctl does not know how to ask for token ids and their "
            "log-probabilities; name the address of one of these, without a path behind it"
        )

    def run(
        self,
        items: Sequence[T],
        ask: Callable[[Client, Place, T], Awaitable[R]],
        done: Callable[[int, R], None] = lambda _, __: None,
        only: Place | None = None,
    ) -> list[R]:
        """Have every item answered, in order.

        done: told of an item's place and its answer as it comes; only: the one server to ask.
        Raises ServerError when no server is left, or where an answer is not what was asked for.
        """
        return asyncio.run(self._run(items, ask, done, only))

    async def _run(
        self,
        items: Sequence[T],
        ask: Callable[[Client, Place, T], Awaitable[R]],
        done: Callable[[int, R], None],
        only: Place | None,
    ) -> list[R]:
        waiting, found, dropped = deque(range(len(items))), dict[int, R](), set[str]()

        async def work(client: Client, place: Place) -> None:
            """Take one item after the other while there are any and the server lives."""
            while waiting and place.url not in dropped and not self.closed:
                item = waiting.popleft()
                try:
                    found[item] = await ask(client, place, items[item])
                except Gone as error:
                    waiting.append(item)
                    if place.url not in dropped:
                        dropped.add(place.url)
                        self._drop(place, error, only)
                else:
                    done(item, found[item])

        while waiting:
            if self.closed:
                raise ServerError("the work ended before its completions were written")
            places = self.places if only is None else [only]
            width = -(-min(self.width, len(waiting)) // len(places))
            async with AsyncExitStack() as opened:
                clients = [
                    (await opened.enter_async_context(Client(place.url, self.timeout_s, width)), place)
                    for place in places
                ]
                try:
                    async with asyncio.TaskGroup() as group:
                        for client, place in clients:
                            for _ in range(width):
                                group.create_task(work(client, place))
                except BaseExceptionGroup as errors:
                    raise _first(errors) from None
        return [found[item] for item in range(len(items))]

    def _drop(self, place: Place, error: Gone, only: Place | None) -> None:
        """Do without a server from now on. Raises ServerError for the last one, Dropped for the only one asked."""
        self.places = [one for one in self.places if one is not place]
        if not self.places:
            raise ServerError(
                f"{place.described} does not answer any more ({error}) and no other is left; start it again and repeat "
                "the command: what is on disk is kept"
            )
        self.say(f"warning: {place.described} does not answer any more ({error}); the others take its requests")
        if only is not None:
            raise Dropped(place.described)

    def each(self, do: Callable[[Place], T]) -> dict[str, T]:
        """Do something at every server, by address; one that does not answer any more is dropped while others live."""
        found = {}
        for place in list(self.places):
            with suppress(Dropped):
                found[place.url] = do(place)
        return found


async def _status(client: Client) -> int:
    """Return how a server answers the page that every kind has, as HTTP says it."""
    try:
        await client.get("/v1/models")
    except Refused as error:
        return error.status
    return 200


def _first(errors: BaseExceptionGroup) -> BaseException:
    """Return one error of those that several tasks ended with."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
