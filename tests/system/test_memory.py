"""Freed memory goes back."""

import os
import sys
import weakref
from pathlib import Path

import pytest
import torch

from kdctl.system.memory import freeze_imports, give_back


class Knot:
    """An object that only a garbage collection frees."""

    def __init__(self) -> None:
        self.self = self


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_tensors_leave_the_process() -> None:
    size, count = 2**19, 100  # below what the C library would map and unmap one by one
    tensors = [torch.ones(size // 4) for _ in range(count)]
    last = torch.ones(size // 4)  # on top of the heap, so that nothing below it goes back by itself
    full = resident()
    del tensors
    give_back()
    assert full - resident() > 0.8 * size * count
    assert float(last.sum()) == size // 4


def test_only_what_comes_after_the_freeze_is_collected() -> None:
    before = weakref.ref(Knot())
    knot = Knot()
    freeze_imports()
    old, new = weakref.ref(knot), weakref.ref(Knot())
    del knot
    give_back()
    assert before() is None
    assert new() is None
    assert old() is not None
