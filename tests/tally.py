"""What a device would be asked to do: counted, as operators, reads that the host waits for and copies, and recorded."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero", "unique_consecutive"}
"""Operators whose result the host needs before it can go on: numbers, or shapes that depend on numbers."""


class Tally(TorchDispatchMode):
    """Counts operators by name. made: tensors that were made of the host's numbers, each a copy to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def operators(self) -> int:
        """Operators that ran."""
        return self.seen.total()

    @property
    def reads(self) -> int:
        """Waits of the host for the device."""
        return sum(count for name, count in self.seen.items() if name in READS)

    @property
    def made(self) -> int:
        """Tensors made of numbers of the host."""
        return self.seen["lift_fresh"]


class Recorder(TorchDispatchMode):
    """Records operators with the very tensors they were given, as a CUDA graph does, for a CPU to do them again.

    Sizes, numbers of the host and which tensor is which stay what they were; only what lies in tensors may differ.
    """

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func.overloadpacket.__name__ not in READS, f"{func} makes the host wait"
        self._done.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do it all again, each result in its place."""
        for func, args, kwargs, results in self._done:
            found = func(*args, **kwargs)
            for place, new in zip(tree_leaves(results), tree_leaves(found), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != new.data_ptr():  # a view is there already
                    place.copy_(new)

    @classmethod
    def record(cls, work: Callable[[], None]) -> Callable[[], None]:
        """Take the place of ``kdctl.system.replay.record``."""
        recorder = cls()
        with recorder:
            work()
        return recorder.replay


def masked_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest: int,
    longest_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Compute what ``torch.nn.attention.varlen.varlen_attn`` is documented to, by one mask over all tokens.

    The last query of a sequence stands at its last key.
    """
    assert enable_gqa
    assert window_size[1] == 0
    assert query_ends.dtype == key_ends.dtype == torch.int32
    places = [torch.arange(len(tensor)) for tensor in (query, key)]
    owner, keys = (
        torch.searchsorted(ends, place, right=True) - 1
        for ends, place in zip((query_ends, key_ends), places, strict=True)
    )
    distance = (places[0] - query_ends[owner + 1]).unsqueeze(-1) - (places[1] - key_ends[keys + 1])
    seen = (owner.unsqueeze(-1) == keys) & (distance >= 0)
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    rows = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
    return scaled_dot_product_attention(*rows, attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)
