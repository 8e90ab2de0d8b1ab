"""What a GPU is asked to do, recorded once and done again in one launch (a CUDA graph)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def replays(tensor: Tensor) -> bool:
    """Tell whether what is done with a tensor can be recorded where it lies."""
    return tensor.device.type == "cuda"


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Record a function that reads and writes the same tensors each time; return what has the GPU do it again.

    Nothing is computed meanwhile. What the host knows, sizes and settings, stays what it is now.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make a wait of the host for the GPU a RuntimeError: what waits cannot be recorded."""
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
