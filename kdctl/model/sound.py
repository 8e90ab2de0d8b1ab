"""Whether a network computes what kdctl will read off it: checked on its own weights when they are loaded.

Sequences laid end to end and rows continued from a cache rest on how a network's code treats masks, positions and
caches. No list of networks says that, so the network itself does: two short sequences are read each alone, by
transformers' own forward pass, and again in the ways that kdctl reads them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.base.errors import ModelError, brief
from kdctl.model.attention import Layout, RowCache, forward, use_layouts
from kdctl.model.head import check_head, head_of

LENGTHS = (6, 11)
WINDOW = 4
"""What windows of attention are narrowed to meanwhile, so that sequences this short reach beyond them."""
MEANT = ("_token_id", "_token_index")
WINDOWS = ("sliding_window", "attention_chunk_size")
LEAST, MOST = (
    {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.03},
    {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25},
)
"""Mean differences of a position's log-probabilities in nats that rounding explains, and that it never does.

Measured on the quickstart's SmolLM2-135M on a CPU, the largest of 13 pairs of sequences: one before the other against
alone 2e-5 in float32, 0.023 in float16 and 0.18 in bfloat16; packed 7e-5 in float32 and 0 in the other two; from a
cache 0. Another one's tokens in sight, as without a mask, make 2.6.
"""


def check_network(model: PreTrainedModel) -> None:
    """Raise ModelError, saying what differs, unless a network gives the same numbers alone, packed and from a cache."""
    probe, part = Probe(model), "alone"
    try:
        with torch.no_grad(), narrowed(model):
            probe.check_finite()
            probe.check_causal()
            part = "up to its final hidden states"
            check_head(model)
            use_layouts(model)
            for part, read in probe.ways().items():
                probe.compare(part, *read())
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a network's own code fails in any way
        raise unreadable(model, part, error) from None


def unreadable(model: PreTrainedModel, part: str, error: Exception) -> ModelError:
    """Say that a network's own code fails when a sequence is read in some way."""
    return ModelError(
        f"model type {model.config.model_type!r} cannot be read {part}: its code ends in {type(error).__name__}: "
        f"{brief(error)}; kdctl lays sequences end to end and continues them from its own cache, which this network's "
        "code does not take; use a network whose attention goes through transformers' attention interface"
    )


def check_weights(model: PreTrainedModel, parts: Mapping[str, Tensor] | None = None) -> None:
    """Raise ModelError if a weight is not a finite number. parts: what is there of weights that have no memory."""
    for name, tensor in {**model.state_dict(), **(parts or {})}.items():
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
            continue
        least, most = torch.stack(torch.aminmax(tensor)).tolist()
        if least != least or abs(least) == torch.inf or abs(most) == torch.inf:
            found = "NaN" if least != least else "Inf"
            advice = (
                "the number may be too large for float16: use teacher.dtype=bfloat16 or float32"
                if model.dtype == torch.float16 and found == "Inf"
                else "the weights are damaged, and so would be every number made from them; fetch or save them again"
            )
            raise ModelError(f"the weights hold {found} in {name}; {advice}")


@contextmanager
def narrowed(model: PreTrainedModel) -> Iterator[None]:
    """Narrow every window of attention that a network has, until the end."""
    owners = {id(one): one for module in model.modules() for one in (module, getattr(module, "config", None))}
    before = [
        (one, name, value)
        for one in owners.values()
        for name in WINDOWS
        if isinstance(value := getattr(one, name, None), int) and value > WINDOW
    ]
    try:
        for one, name, _ in before:
            setattr(one, name, WINDOW)
        yield
    finally:
        for one, name, value in before:
            setattr(one, name, value)


@dataclass(frozen=True)
class Probe:
    """Two short sequences and what a network says of them."""

    model: PreTrainedModel

    @cached_property
    def ids(self) -> Tensor:
        """Both sequences end to end, without tokens that a configuration gives a meaning."""
        vocabulary: int = self.model.get_input_embeddings().weight.shape[0]  # pyright: ignore
        named = [value for name, value in vars(self.model.config).items() if name.endswith(MEANT)]
        special = {token for value in named for token in (value if isinstance(value, list) else [value])}
        usual = [token for token in range(1, min(vocabulary, 4096)) if token not in special]
        numbers = torch.Generator().manual_seed(0)
        chosen = torch.randint(0, len(usual), (sum(LENGTHS),), generator=numbers)
        return torch.tensor(usual)[chosen].to(self.model.device)

    def plain(self, ids: Tensor) -> Tensor:
        """Return log-probabilities by the network's own forward pass over one sequence, (T, V)."""
        return self.model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(-1)

    @cached_property
    def alone(self) -> Tensor:
        """Log-probabilities of each sequence alone, (N, V)."""
        return torch.cat([self.plain(part) for part in self.ids.split(LENGTHS)])

    @cached_property
    def joined(self) -> Tensor:
        """Log-probabilities of both as if they were one sequence, (N, V)."""
        return self.plain(self.ids)

    @cached_property
    def limit(self) -> float:
        """The largest difference that passes: what rounding explains, and a quarter of what a lost mask makes."""
        effect = largest(self.joined, self.alone)
        dtype = self.model.dtype if self.model.dtype in LEAST else torch.float32
        return max(LEAST[dtype], min(MOST[dtype], effect / 4))

    def check_finite(self) -> None:
        """Raise ModelError if numbers overflow on the way through the network."""
        if not bool((torch.isfinite(self.alone) & torch.isfinite(self.joined)).all()):
            dtype = str(self.model.dtype).removeprefix("torch.")
            advice = (
                "its numbers are too large for this format: use teacher.dtype=bfloat16 or float32"
                if dtype == "float16"
                else "its weights, or the numbers in its config.json, are damaged; fetch the model again"
            )
            raise ModelError(f"the network's logits are not finite numbers in {dtype}; {advice}")

    def check_causal(self) -> None:
        """Raise ModelError if tokens see what follows them."""
        first = LENGTHS[0]
        self.compare("without what follows it", self.joined[:first], self.alone[:first], "it is not causal, and ")

    def ways(self) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
        """Return how sequences are read, in order, each with what that gives and what it should."""
        cache = RowCache(2, LENGTHS[1])
        return {
            "packed beside another sequence": self.packed,
            "into a cache": lambda: self.begun(cache),
            "from a cache": lambda: self.continued(cache),
        }

    def packed(self) -> tuple[Tensor, Tensor]:
        """Read both sequences end to end."""
        places = [place for length in LENGTHS for place in range(length)]
        return self.read(places, self.ids, Layout(LENGTHS)), self.alone

    def begun(self, cache: RowCache) -> tuple[Tensor, Tensor]:
        """Read both sequences into a cache, but for the first's last token and the second's last two."""
        a, b = LENGTHS[0] - 1, LENGTHS[1] - 2
        kept = [*range(a), *range(a + 1, a + 1 + b)]
        found = self.read([*range(a), *range(b)], self.ids[kept], Layout((a, b), cache), [0] * a + [1] * b)
        return found, self.alone[kept]

    def continued(self, cache: RowCache) -> tuple[Tensor, Tensor]:
        """Read the next token of both sequences."""
        a, b = LENGTHS[0] - 1, LENGTHS[1] - 2
        count = torch.tensor([a + 1, b + 1], device=self.ids.device)
        kept = [a, a + 1 + b]
        return self.read([a, b], self.ids[kept], Layout((), cache, count, b + 1), [0, 1]), self.alone[kept]

    def read(self, place: list[int], ids: Tensor, layout: Layout, row: list[int] | None = None) -> Tensor:
        """Return log-probabilities as kdctl computes them, (N, V)."""
        places = torch.tensor(place, device=ids.device)
        if layout.cache is not None and row is not None:
            layout.cache.point(torch.tensor(row, device=ids.device), places)
        return head_of(self.model).logits(forward(self.model, ids, places, layout)).log_softmax(-1)

    def compare(self, part: str, found: Tensor, wanted: Tensor, reason: str = "") -> None:
        """Raise ModelError if a way to read gives other numbers than the network's own."""
        gap = largest(found, wanted)
        if not gap <= self.limit:
            raise ModelError(
                f"model type {self.model.config.model_type!r} gives other numbers for a sequence read {part} than "
                f"alone: {reason}log-probabilities differ by {gap:.2g} nats on average, {self.limit:.2g} is what "
                "rounding explains; kdctl would train and measure another distribution, so use another network"
            )


def largest(found: Tensor, wanted: Tensor) -> float:
    """Return the largest mean difference of a position's log-probabilities."""
    return float((found - wanted).abs().mean(-1).max())
