"""Freed memory goes back."""

import os
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdctl.system import memory
from kdctl.system.memory import freeze_imports, give_back, spare_bytes

GIB = 2**30


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


@pytest.mark.skipif(sys.platform != "linux", reason="counts in KiB")
@pytest.mark.parametrize(
    ("processes", "machine", "spare"), [(1, 64, 30 - 4), (2, 64, 30 // 2 - 4), (1, 20, 20 - 10 - 4), (1, 12, -2)]
)
def test_spare_is_what_is_free_beside_processes_at_their_largest(
    monkeypatch: pytest.MonkeyPatch, processes: int, machine: int, spare: int
) -> None:
    now = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10 * GIB))
    monkeypatch.setattr("psutil.Process", lambda: now)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=30 * GIB))
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=14 * 2**20))
    monkeypatch.setattr(memory, "machine_bytes", lambda: machine * GIB)
    assert spare_bytes(processes) == spare * GIB
