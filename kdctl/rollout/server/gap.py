"""Whether a server holds the weights that it should: log-probabilities of fixed tokens, there and in this process.

Two programs that compute with the same weights in bfloat16 differ by some hundredths of a nat a token. Other weights
differ by tenths, and so does another prompt. A few training steps change less than the rounding, but not at random:
with d = new − old of each token and e = server − old, the slope Σ d·e / Σ d² is 1 for a server that has the new weights
and 0 for one that kept the old. A token more before the prompt is told in the same way.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BOUND = 0.15
"""Largest mean absolute difference of log-probabilities, nats a token, of a server that holds the right weights."""
SIGMAS = 3.0
"""Standard deviations by which old and new weights must be apart on the fixed tokens to be told apart."""


@dataclass(frozen=True)
class Gap:
    """How far a server's log-probabilities are from those computed here, nats a token.

    slope: 0 for the weights before a refresh and 1 for those after it; None where the two cannot be told apart.
    """

    mean: float
    largest: float
    tokens: int
    slope: float | None = None

    @property
    def sound(self) -> bool:
        """Tell whether the server holds the right weights, as far as can be told."""
        return self.mean <= BOUND and (self.slope is None or self.slope > 0.5)


def gap(there: Tensor, here: Tensor, old: Tensor | None = None) -> Gap:
    """Compare log-probabilities of the same tokens, (M,): the server's, those of the weights here, of those before."""
    off = (there - here).abs()
    return Gap(off.mean().item(), off.max().item(), len(here), None if old is None else slope(there, here, old))


def slope(there: Tensor, here: Tensor, old: Tensor) -> float | None:
    """Return the least-squares slope of server − old on new − old, through the origin.

    None where its standard error is too large to tell 0 from 1. The noise is the smaller of both residuals' spread,
    since a server holds one of the two.
    """
    moved, found = (here - old).double(), (there - old).double()
    size = moved.square().sum().item()
    noise = min((there - here).double().square().mean().item(), found.square().mean().item())
    if size == 0 or 0.5 * math.sqrt(size) < SIGMAS * math.sqrt(noise):
        return None
    return torch.dot(moved, found).item() / size
