"""Random numbers that are functions of a key, not of a state.

Every draw in kdctl is a hash of what it is for: (seed, step, row) for λ, (seed, policy step, prompt, sample, position)
for a sampled token. So a resumed run, another batch size or another process sees the same numbers.
"""

import hashlib
from functools import lru_cache

import numpy as np


def digest(*key: int | str) -> int:
    """Hash a key of integers and strings to 64 bits."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(*key: int | str) -> float:
    """Map a key to a uniform number in [0, 1) with 53 random bits."""
    return (digest(*key) >> 11) * 2.0**-53


@lru_cache(maxsize=4, typed=True)
def permutation(count: int, *key: int | str) -> np.ndarray:
    """Return the permutation of ``range(count)`` that belongs to a key, shape (count,), read-only.

    The last few are kept: consecutive slots of an endless sequence read the same one, and two sequences that end a pass
    at once read four. Integers are of 32 bits where those suffice: 40 MB for ten million items.
    """
    order = np.random.Generator(np.random.Philox(key=digest(*key))).permutation(count)
    order = order.astype(np.int32) if count <= 2**31 else order
    order.flags.writeable = False
    return order


def shuffled_index(slot: int, count: int, *key: int | str) -> int:
    """Return which of ``count`` items stands at place ``slot`` of an endless sequence of reshuffled passes."""
    epoch, place = divmod(slot, count)
    return int(permutation(count, *key, epoch)[place])
