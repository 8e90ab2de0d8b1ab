"""What passes of a network compute, move and send, and how long that takes at given rates.

Operations are those of matrix products, a multiplication and an addition each. A token is multiplied with every weight
of its linear layers once, and its queries attend to half of its sequence on average: 2·W + 2·A·L operations, W weights,
A numbers of its queries in all layers, L tokens of the sequence. Backward multiplies twice as much, and makes the
scores of attention once more, a fifth of what it does there (Dao et al. 2022, FlashAttention, algorithm 4).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from kdctl.cost.network import Network
from kdctl.cost.records import Limit, Rates, Stretch
from kdctl.quant.calibrate import by_decoder_layer

SAMPLED = 8
"""Float32 numbers read or written for each token of the vocabulary while one is drawn (``rollout/sampler.py``)."""


@dataclass(frozen=True)
class Work:
    """What is done at one time, so that the slowest part of a machine decides how long it takes.

    products: operations; moved, sent, stored: bytes of memory, between processes and of the disk; crossing: those sent
    between copies of divided models; started: operators.
    """

    products: float = 0.0
    moved: float = 0.0
    started: float = 0.0
    sent: float = 0.0
    stored: float = 0.0
    crossing: float = 0.0
    times: float = 1.0

    def parts(self, rates: Rates) -> dict[Limit, float]:
        """Return the seconds that each part of a machine needs."""
        return {
            "products": self.times * self.products / (rates.products_per_s * rates.reached),
            "memory": self.times * self.moved / (rates.memory_bytes_per_s * rates.memory_reached),
            "operators": self.times * self.started * rates.operator_s,
            "network": self.times * self._sending(rates),
            "disk": self.times * self.stored / rates.disk_bytes_per_s,
        }

    def _sending(self, rates: Rates) -> float:
        between = rates.between_bytes_per_s or rates.network_bytes_per_s
        return self.sent / rates.network_bytes_per_s + self.crossing / between

    def repeated(self, times: float) -> "Work":
        """Return the same, done so many times."""
        return replace(self, times=self.times * times)


def stretch(name: str, works: Iterable[Work], rates: Rates) -> Stretch:
    """Add up works that follow one another."""
    spent: dict[Limit, float] = {}
    for work in works:
        parts = work.parts(rates)
        limit = max(parts, key=lambda each: parts[each])
        spent[limit] = spent.get(limit, 0.0) + parts[limit]
    spent = {limit: seconds for limit, seconds in spent.items() if seconds} or {"products": 0.0}
    return Stretch(
        name=name, seconds_s=sum(spent.values()), limit=max(spent, key=lambda each: spent[each]), parts_s=spent
    )


@dataclass(frozen=True)
class Passes:
    """The passes of one network."""

    network: Network

    @property
    def weights(self) -> int:
        """Bytes of what a token is multiplied with, output head left out."""
        return self.network.multiplied * self.network.itemsize

    @property
    def head_weights(self) -> int:
        """Numbers of the output head."""
        return self.network.vocabulary * self.network.hidden

    def forward(self, tokens: float, length: float) -> Work:
        """Read so many tokens in one pass, in sequences of a length, up to the final hidden states."""
        products = 2 * tokens * self.network.multiplied + self._attention(tokens, length)
        return Work(products=products, moved=self.weights, started=self.network.operators)

    def _attention(self, tokens: float, length: float) -> float:
        return 2 * tokens * self.network.attended * length

    def training(self, tokens: float, length: float, checkpointing: str) -> Work:
        """Read and go back: forward, backward, and what activation checkpointing repeats."""
        once = self.forward(tokens, length)
        products = 3 * once.products + self._attention(tokens, length) / 2
        products += once.products - 2 * tokens * self._last if checkpointing == "full" else 0
        started = once.started * (3 if checkpointing == "none" else 4)
        return Work(products=products, moved=3 * once.moved, started=started)

    @property
    def _last(self) -> int:
        """Weights of the last linear layer of every decoder layer, whose product no backward pass needs again."""
        groups = by_decoder_layer(list(self.network.layers)).values()
        return sum(math.prod(self.network.layers[names[-1]]) for names in groups)

    def head(self, tokens: float, products: int = 1) -> Work:
        """Multiply final hidden states with the output head so many times, gradients with its transpose included."""
        return Work(products=products * 2 * tokens * self.head_weights)

    def divergence(self, tokens: float) -> Work:
        """Make a divergence and its gradient of two models' logits."""
        return Work(moved=tokens * self.network.loss_moved)

    def decoding(self, rows: float, context: float, started: bool) -> Work:
        """Draw a token for each row: all weights are read once, and the keys and values of every row.

        started: operators are started one by one; else a server replays them as a graph.
        """
        network = self.network
        products = rows * (2 * (network.multiplied + self.head_weights) + 4 * network.attended * context)
        moved = self.weights + self.head_weights * network.itemsize
        moved += rows * (context * network.cache + SAMPLED * 4 * network.vocabulary)
        return Work(products=products, moved=moved, started=network.operators if started else 0)
