"""One call for all sequences is handed what a call a sequence computes."""

import pytest
import torch
from torch import Tensor

from kdctl.model import varlen
from kdctl.model.varlen import Ends, in_one_call, one_by_one, takes
from tests.tally import Tally, masked_varlen


def made_up(
    lengths: tuple[int, ...], prefix: int
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Draw queries of four heads, and keys and values of two, of all sequences and of what they all see first."""
    numbers = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), 8, generator=numbers) for heads in (4, 2, 2))
    first = torch.randn(2, 1, 2, prefix, 8, generator=numbers)
    return (query, key, value), (first[0], first[1]) if prefix else None


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("prefix", [0, 5])
def test_all_sequences_at_once_see_what_each_sees(
    monkeypatch: pytest.MonkeyPatch, prefix: int, window: int | None
) -> None:
    monkeypatch.setattr(varlen.varlen, "varlen_attn", masked_varlen)
    lengths = (7, 3, 12, 1)
    own, first = made_up(lengths, prefix)
    ends = Ends.of(lengths, prefix, torch.device("cpu"))
    assert (ends.longest, ends.longest_keys) == (12, 12 + prefix)
    found = in_one_call(*own, first, ends, window, 0.3)
    torch.testing.assert_close(found, one_by_one(*own, first, lengths, window, 0.3), rtol=1e-5, atol=1e-6)


def test_the_number_of_operators_is_that_of_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen.varlen, "varlen_attn", masked_varlen)
    counts = []
    for lengths in ((20,), (1,) * 20):
        own, first = made_up(lengths, 5)
        ends = Ends.of(lengths, 5, torch.device("cpu"))
        with Tally() as tally:
            in_one_call(*own, first, ends, 4, 0.3)
        counts.append(tally.operators)
        assert tally.reads == 0
    assert counts[0] == counts[1]


def test_tensors_on_a_cpu_go_one_by_one() -> None:
    own, _ = made_up((3,), 0)
    assert not takes(*own)
