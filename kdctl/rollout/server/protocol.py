"""What a server has to speak, and what kdctl makes of its answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from kdctl.config.preset import Form
from kdctl.rollout.server.client import Client


@dataclass(frozen=True)
class Draw:
    """One completion to be drawn. stop: the tokens that end it; seed: its own; epoch: names the weights behind it.

    forced: draw this token first, whatever its probability, to see what the server makes of it.
    """

    prompt_ids: Sequence[int]
    temperature: float
    top_p: float
    top_k: int
    min_new_tokens: int
    max_new_tokens: int
    stop: Sequence[int]
    seed: int
    epoch: str = "0"
    forced: int | None = None


@dataclass(frozen=True)
class Drawn:
    """What a server says that it drew. logprobs: None for a token of which it gives none.

    prompt_tokens: those that it read; ended: it stopped at a token and not at the longest length.
    """

    ids: list[int]
    logprobs: list[float | None]
    ended: bool
    prompt_tokens: int


@dataclass(frozen=True)
class About:
    """What a server says of itself. reach: tokens of the longest sequence, None where it does not say."""

    version: str
    model: str
    reach: int | None = None


class Malformed(Exception):
    """An answer is not what the protocol says."""


class Server(Protocol):
    """One kind of server. Its methods are called inside a running event loop and raise what ``Client`` does."""

    kind: ClassVar[str]
    form: ClassVar[Form]
    """How it takes weights."""
    ids_advice: ClassVar[str]
    """What to do where answers lack token ids or log-probabilities."""
    raw_advice: ClassVar[str]
    """What to do where log-probabilities are not those of temperature 1."""
    reload_advice: ClassVar[str]
    """What to do where weights cannot be replaced."""
    own_defaults_advice: ClassVar[str]
    """What to do where samples do not follow the request."""
    masks_stop: ClassVar[bool]
    """Whether it can keep a completion from ending before ``min_new_tokens``."""

    @staticmethod
    async def recognise(client: Client) -> "About | None":
        """Return what a server says of itself if it is of this kind."""
        ...

    def __init__(self, about: About) -> None: ...

    async def draw(self, client: Client, draw: Draw) -> Drawn:
        """Draw one completion. Raises Malformed."""
        ...

    def fields(self, draw: Draw) -> dict[str, Any]:
        """Return all fields of a request, to be sent and to be written down."""
        ...

    async def score(self, client: Client, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities of given tokens at temperature 1. Raises Malformed."""
        ...

    async def reload(self, client: Client, folder: Path) -> None:
        """Replace the weights by those of a model folder and forget what was computed with the old ones."""
        ...


def pick(answer: Any, *path: str | int) -> Any:
    """Return what lies at a path inside JSON. Raises Malformed, with the path, if it is not there."""
    found = answer
    for place in path:
        try:
            found = found[place]
        except (KeyError, IndexError, TypeError):
            raise Malformed(f"its answer has no {'.'.join(map(str, path))}") from None
    return found


def token_ids(found: Any, where: str) -> list[int]:
    """Check a list of token ids."""
    if not isinstance(found, list) or not all(type(one) is int for one in found):
        raise Malformed(f"{where} of its answer is {str(found)[:60]!r}, not a list of token ids")
    return found


def number(found: Any) -> float:
    """Check one log-probability."""
    if type(found) not in (int, float):
        raise Malformed(f"it states the log-probability {str(found)[:40]!r}, which is no number")
    return float(found)


def numbers(found: Any, where: str) -> list[float | None]:
    """Check a list of log-probabilities; None stands for one that is not given."""
    if not isinstance(found, list) or not all(one is None or type(one) in (int, float) for one in found):
        raise Malformed(f"{where} of its answer is {str(found)[:60]!r}, not a list of log-probabilities")
    return [None if one is None else float(one) for one in found]
