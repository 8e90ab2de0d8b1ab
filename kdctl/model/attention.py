"""Attention over sequences laid end to end, beside rows that continue from a cache.

No token is spent on padding: a batch is one row of tokens, and a layout says where each sequence lies. Models call
``attend`` once ``use_layouts`` has named it their implementation; without a layout it is transformers' own ``sdpa``.
Causality and sliding windows follow from the layout, so no mask of size (T, T) is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from kdctl.base.errors import ModelError
from kdctl.model.context import reach_of
from kdctl.model.varlen import Ends, in_one_call, one_by_one, takes
from kdctl.system.transfers import upload

NAME = "kdctl"
UNKNOWN = ("softcap", "s_aux", "position_bias", "indices")
"""What a network may ask of its attention that no layout carries: caps, sinks, biases and chosen tokens."""


class RowCache:
    """Keys and values of up to ``rows`` sequences of up to ``capacity`` tokens, written in place.

    It has the one method that transformers' attention layers call, ``update``; ``point`` says before each forward pass
    which row and place each of its tokens belongs to.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity = rows, capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._row = self._place = torch.empty(0, dtype=torch.int64)

    def point(self, row: Tensor, place: Tensor) -> None:
        """Say where the tokens of the next forward pass go. row, place: (N,) int64."""
        self._row, self._place = row, place

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Write (1, heads, N, D) keys and values to their places and hand them back."""
        if layer not in self._layers:
            self._layers[layer] = self._room(key), self._room(value)
        for kept, new in zip(self._layers[layer], (key, value), strict=True):
            kept[self._row, :, self._place] = new[0].transpose(0, 1)
        return key, value

    def get_seq_length(self, *_: object) -> int:
        """Return 0: places are given with the tokens, and a network that counts them itself starts afresh."""
        return 0

    def _room(self, new: Tensor) -> Tensor:
        return new.new_zeros(self.rows, new.shape[1], self.capacity, new.shape[-1])

    def first(self, layer: int, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return views of the first rows' first tokens, (rows, heads, tokens, D) each."""
        keys, values = self._layers[layer]
        return keys[:rows, :, :tokens], values[:rows, :, :tokens]

    def of_row(self, layer: int, row: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return views of a row's first tokens, (1, heads, tokens, D) each."""
        keys, values = self._layers[layer]
        return keys[row : row + 1, :, :tokens], values[row : row + 1, :, :tokens]

    def copy(self, source: int, targets: Sequence[int], tokens: int) -> None:
        """Copy a row's first tokens over other rows."""
        if not targets:
            return
        rows = targets[0] if len(targets) == 1 else upload(torch.tensor(targets), self._place.device)
        for tensor in chain.from_iterable(self._layers.values()):
            tensor[rows, :, :tokens] = tensor[source, :, :tokens]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one row (1, N) belong: one new token for each of the cache's first rows, then sequences.

    counts: (R,) int64, the tokens that each continued row has, its new one included; longest: the largest of them.
    prefix: the first tokens of every sequence, which are not in it but in the cache's last row.
    """

    sequences: Sequence[int] = ()
    cache: RowCache | None = None
    counts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    longest: int = 0
    prefix: int = 0
    _seen: dict[int | None, Tensor] = field(default_factory=dict)
    _ends: dict[torch.device, Ends] = field(default_factory=dict)

    def ends(self, device: torch.device) -> Ends:
        """Return where sequences and what they see end, made once for all layers."""
        if device not in self._ends:
            self._ends[device] = Ends.of(self.sequences, self.prefix, device)
        return self._ends[device]

    def seen(self, window: int | None) -> Tensor:
        """Return which of its tokens each continued row sees, (R, 1, 1, longest) bool, made once for all layers."""
        if window not in self._seen:
            place, count = torch.arange(self.longest, device=self.counts.device), self.counts.unsqueeze(-1)
            seen = place < count
            if window is not None:
                seen &= place >= count - window
            self._seen[window] = seen[:, None, None]
        return self._seen[window]


def check_attention(model: PreTrainedModel) -> None:
    """Raise ModelError if a model's attention is not transformers' ``sdpa``."""
    implementation = model.config._attn_implementation
    if implementation not in (NAME, "sdpa"):
        raise ModelError(
            f"model type {model.config.model_type!r} computes attention as {implementation!r}, in code of its own or "
            "because transformers' 'sdpa' lacks what it needs; kdctl lays sequences end to end, for which it knows "
            "'sdpa' only, so use another network"
        )


def use_layouts(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model accept layouts; what it computes without one stays the same to the bit.

    Raises ModelError if its attention is not transformers' ``sdpa``.
    """
    check_attention(model)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    return model


def forward(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """Run a model over the tokens of a layout, up to its final hidden states, (N, H).

    input_ids, position_ids: (N,) int64, the tokens and their places in their sequences. Raises ModelError if the
    model's attention cannot take a layout, or a sequence is longer than the network reaches.
    """
    reach_of(model.config).check(max(layout.longest, *(layout.prefix + one for one in layout.sequences), 0))
    output = use_layouts(model).base_model(
        input_ids=input_ids.unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        attention_mask=torch.empty(0, 0, 0, 0),  # every model hands four dimensions through, so that none builds a mask
        past_key_values=layout.cache,
        use_cache=layout.cache is not None,
        layout=layout,
    )
    return output.last_hidden_state[0]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence of a layout. query: (1, heads, N, D); returns (1, N, heads, D)."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in UNKNOWN:
        if options.get(name) is not None:
            raise ModelError(f"the model's attention has a {name}, which kdctl does not compute; use another network")
    scale, window = options["scaling"], options.get("sliding_window")
    start, parts = len(layout.counts), []
    if layout.cache is not None and start:
        cached = layout.cache.first(module.layer_idx, start, layout.longest)  # pyright: ignore[reportArgumentType]
        parts.append(_continue(query[:, :, :start], *cached, layout.seen(window), scale))
    if layout.sequences:
        own, prefix = (query[:, :, start:], key[:, :, start:], value[:, :, start:]), None
        if layout.cache is not None and layout.prefix:
            prefix = layout.cache.of_row(module.layer_idx, layout.cache.rows - 1, layout.prefix)  # pyright: ignore
        if takes(*own):
            parts.append(in_one_call(*own, prefix, layout.ends(query.device), window, scale))
        else:
            parts.append(one_by_one(*own, prefix, layout.sequences, window, scale))
    return (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).transpose(1, 2).contiguous(), None


def _continue(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attend from one token a row, (1, heads, R, D), to the rows' keys, (R, key heads, T, D).

    The query heads that share a key head become its queries, so that no key is repeated.
    """
    rows, heads = key.shape[:2]
    grouped = query[0].transpose(0, 1).reshape(rows, heads, -1, query.shape[-1])
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=seen, scale=scale)
    return out.reshape(rows, -1, value.shape[-1]).transpose(0, 1).unsqueeze(0)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
