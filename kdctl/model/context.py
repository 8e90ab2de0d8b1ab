"""How long a sequence may be: up to where a network is what it was trained as, and computes the same in any company.

Two kinds of rotary scaling choose their factors by the longest sequence of a forward pass (``dynamic_rope_update`` in
transformers). Sequences that lie end to end would get each other's, so these networks are used up to where it begins.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from kdctl.base.errors import ModelError, PresetError

YARN, LONGROPE, DYNAMIC = "yarn", "longrope", "dynamic"
POSITIONS = ("max_position_embeddings", "max_target_positions")
"""What a configuration calls the positions that a network was made for."""


@dataclass(frozen=True)
class Reach:
    """Tokens that a sequence may have, None where there is no limit, and why no more."""

    tokens: int | None
    why: str = ""

    def has(self, tokens: int) -> bool:
        """Tell whether a sequence of so many tokens is in reach."""
        return self.tokens is None or tokens <= self.tokens

    def room(self, tokens: int, wanted: int) -> int:
        """Return how many of the wanted tokens may follow."""
        return wanted if self.tokens is None else min(wanted, max(0, self.tokens - tokens))

    def check(self, tokens: int) -> None:
        """Raise ModelError for a sequence that is out of reach."""
        if not self.has(tokens):
            raise ModelError(f"a sequence of {tokens} tokens, and {self.why}")


UNLIMITED = Reach(None)


def check_completions(reach: Reach, prompt: int, completion: int, setting: str) -> None:
    """Raise PresetError if the longest prompt with a completion of ``setting`` tokens is out of reach."""
    if reach.tokens is None or reach.has(prompt + completion):
        return
    room, prompts = reach.tokens - prompt, "prompts.max_prompt_tokens (longer prompts are left out)"
    way = (
        f"lower {setting} to {room}, or {prompts}, or both"
        if room > 0
        else f"lower {prompts}, and {setting} if need be"
    )
    raise PresetError(
        f"a prompt of {prompt} tokens and {setting}={completion} make {prompt + completion}, and {reach.why}; {way}"
    )


def reach_of(config: PretrainedConfig) -> Reach:
    """Return what a network may be given."""
    text = config.get_text_config(decoder=True)
    return min([*_exact(text), _trained(text)], key=lambda one: float("inf") if one.tokens is None else one.tokens)


def _trained(config: PretrainedConfig) -> Reach:
    """Return the positions that a network was made for; YaRN reaches farther than the training it started from."""
    found = ((name, _natural(getattr(config, name, None))) for name in POSITIONS)
    name, stated = next(((name, value) for name, value in found if value is not None), ("", None))
    if stated is None:
        return UNLIMITED
    farther = [
        int(rope.get("original_max_position_embeddings", 0) * rope.get("factor", 1))
        for rope in _rotary(config)
        if rope.get("rope_type") == YARN and rope.get("original_max_position_embeddings") and rope.get("factor")
    ]
    tokens = max([stated, *farther])
    return Reach(tokens, f"the network's context is {tokens} tokens ({name} in config.json)")


def _exact(config: PretrainedConfig) -> Iterator[Reach]:
    """Yield up to where rotary factors do not depend on the longest sequence of a pass."""
    for rope in _rotary(config):
        kind = str(rope.get("rope_type", rope.get("type")))
        if DYNAMIC in kind:
            limit = getattr(config, "max_position_embeddings", None)
        elif kind == LONGROPE:
            limit = rope.get("original_max_position_embeddings", getattr(config, "max_position_embeddings", None))
        else:
            continue
        if not isinstance(limit, (int, float)) or not 1 <= limit < math.inf:
            raise ModelError(f"rotary scaling {kind!r} begins beyond {limit!r:.80} tokens by config.json; correct that")
        tokens = int(limit)
        yield Reach(
            tokens,
            f"beyond {tokens} this network's rotary scaling {kind!r} has other factors, chosen by the longest "
            "sequence of a pass; kdctl packs sequences, so that shorter ones would be computed with them too",
        )


def _rotary(config: PretrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration's rotary parameters, which may differ by kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    if isinstance(found, Mapping):
        yield from (one for one in (found, *found.values()) if isinstance(one, Mapping))


def _natural(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
