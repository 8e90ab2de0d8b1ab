"""What a network takes in memory and work, from its configuration alone.

Nothing is loaded. Parameters are counted on a model without storage; what passes keep and make is seen by running the
real ones on tensors that have a shape and no numbers.
"""

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from kdctl.base.errors import ModelError, PresetError
from kdctl.config.preset import QuantizeSection
from kdctl.distill.divergence import Objective, value_and_gradient
from kdctl.model.activation_checkpointing import Checkpointing, recomputed, set_checkpointing
from kdctl.model.attention import Layout, RowCache, forward, use_layouts
from kdctl.model.head import ROWS_IN_CACHE, logits_budget, token_chunk
from kdctl.model.load import linear_shapes, skeleton
from kdctl.model.sound import unreadable
from kdctl.quant.apply import select_layers

CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
SEQUENCES = (512,) * 8
"""What is sent through a network: so many tokens that what does not grow with them hardly counts."""


@dataclass(frozen=True)
class Activations:
    """Bytes a token of a training pass: ``kept`` for backward when forward ends, ``peak`` at the worst moment."""

    kept: float
    peak: float


@dataclass(frozen=True)
class Network:
    """What a plan needs to know of a network.

    layers: the quantized ones, (out_features, in_features). norms: their lengths. itemsize: bytes a number. cache,
    reading: bytes a token of keys and values, and of a forward pass that keeps nothing. loss: bytes of one row of
    float32 logits with all that the divergence makes of it; loss_moved: bytes that it reads and writes of such a row.
    multiplied: weights that every token is multiplied with, output head left out. attended: numbers of a token's
    queries in all layers. inputs: in_features of each tensor that linear layers are given, those that share one counted
    once. operators: those of a forward pass that compute, views left out.
    """

    layers: Mapping[str, tuple[int, int]]
    other_parameters: int
    norms: tuple[int, ...]
    hidden: int
    vocabulary: int
    itemsize: int
    cache: float
    reading: float
    activations: Mapping[Checkpointing, Activations]
    loss: float
    loss_moved: float
    multiplied: int
    attended: float
    inputs: tuple[int, ...]
    operators: int

    @property
    def quantized_parameters(self) -> int:
        """Weights that get codes."""
        return sum(rows * columns for rows, columns in self.layers.values())

    @property
    def largest_layer(self) -> int:
        """Weights of the largest quantized layer."""
        return max(rows * columns for rows, columns in self.layers.values())

    def loss_bytes(self, gpu_bytes: int | None) -> int:
        """Return the bytes of one chunk of logits: both models', and few float32 rows at a time on a CPU (None)."""
        chunk = token_chunk(self.vocabulary, logits_budget(gpu_bytes))
        rows = min(ROWS_IN_CACHE, chunk) if gpu_bytes is None else chunk
        return int(2 * chunk * self.vocabulary * self.itemsize + rows * self.loss)


def look_at(config: PretrainedConfig, settings: QuantizeSection, dtype: torch.dtype, objective: Objective) -> Network:
    """Look at a network of a configuration.

    Raises ModelError for networks that kdctl does not handle, PresetError for a grid that does not fit.
    """
    bare = skeleton(config).to(dtype)  # pyright: ignore[reportArgumentType]
    names, shapes = select_layers(bare, settings), linear_shapes(bare)
    logging.getLogger(fake_tensor.__name__).disabled = True  # it prints what is raised
    layers = {name: shapes[name] for name in names}
    vocabulary: int = bare.get_output_embeddings().weight.shape[0]  # pyright: ignore
    norms = tuple(len(p) for name, p in bare.named_parameters() if p.dim() == 1 and "norm" in name)
    parameters = bare.num_parameters()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = use_layouts(bare.to_empty(device="cpu").eval())
            model.requires_grad_(False)
            cache, reading = _cache(model), _reading(model)
            seen, operators = _passed(model)
            activations: dict[Checkpointing, Activations] = {how: _training(model, names, how) for how in CHECKPOINTING}
            loss, loss_moved = _loss(vocabulary, objective)
    except DataDependentOutputException as error:
        raise ModelError(f"the network's shapes depend on numbers, so nothing can be planned for it: {error}") from None
    except (ModelError, PresetError):
        raise
    except Exception as error:  # noqa: BLE001 - a network's own code fails in any way
        raise unreadable(bare, "packed beside another sequence", error) from None
    return Network(
        layers=layers,
        other_parameters=parameters - sum(rows * columns for rows, columns in layers.values()),
        norms=norms,
        hidden=config.hidden_size,
        vocabulary=vocabulary,
        itemsize=dtype.itemsize,
        cache=cache,
        reading=reading,
        activations=activations,
        loss=loss,
        loss_moved=loss_moved,
        multiplied=sum(rows * columns for rows, columns in shapes.values()),
        attended=seen.numbers,
        inputs=tuple(seen.inputs),
        operators=operators,
    )


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that are made under it and still referred to, now and at most.

    operators: how many ran that compute something; moved: the bytes of what they were given and what they returned.
    """

    def __init__(self, there: nn.Module | None = None):
        super().__init__()
        tensors = [] if there is None else [*there.parameters(), *there.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.live = self.peak = self.operators = self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for leaf in returned:
            self._see(leaf.untyped_storage())
        if not func.is_view:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.operators += 1
            self.moved += sum(leaf.nbytes for leaf in given + returned)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Seen(TorchFunctionMode):
    """Looks at what the layers of a pass are given.

    numbers: those of a token's queries; where values are narrower, the mean. inputs: in_features of linear layers,
    those that follow one another with the same input counted once.
    """

    def __init__(self):
        super().__init__()
        self.numbers = 0.0
        self.inputs: list[int] = []
        self._last: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run a function and look at its arguments."""
        if func is scaled_dot_product_attention:
            query, _, value = args[:3]
            self.numbers += query.shape[1] * (query.shape[-1] + value.shape[-1]) / 2
        if func is linear and args[0] is not self._last:
            self._last = args[0]
            self.inputs.append(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def _read(model: PreTrainedModel, cache: RowCache | None = None, sequences: tuple[int, ...] = SEQUENCES) -> Tensor:
    """Run sequences through a model."""
    places = torch.zeros(sum(sequences), dtype=torch.int64)
    if cache is not None:
        cache.point(places, places)
    return forward(model, places, places, Layout(sequences, cache))


def _passed(model: PreTrainedModel) -> tuple[Seen, int]:
    """Return what the layers are given in a pass of one sequence, and the operators in it that compute."""
    with torch.no_grad(), Seen() as seen, Meter(model) as meter:
        _read(model, sequences=SEQUENCES[:1])
    return seen, meter.operators


def _cache(model: PreTrainedModel) -> float:
    """Return the bytes of keys and values of a token in all layers."""
    cache = RowCache(1, 1)
    with torch.no_grad():
        _read(model, cache)
    layers = [cache.first(layer, 1, 1) for layer in range(model.config.num_hidden_layers)]
    return sum(tensor.nbytes for pair in layers for tensor in pair)


def _reading(model: PreTrainedModel) -> float:
    """Return the most bytes a token of a forward pass without backward."""
    with torch.no_grad(), Meter(model) as meter:
        _read(model)
    return meter.peak / sum(SEQUENCES)


def _training(model: PreTrainedModel, names: list[str], how: Checkpointing) -> Activations:
    """Return the bytes a token of forward and backward; gradients of weights are freed as they appear."""
    parameters = [model.get_parameter(f"{name}.weight").requires_grad_(True) for name in names]
    hooks = [parameter.register_post_accumulate_grad_hook(_free) for parameter in parameters]
    set_checkpointing(model, how)
    with Meter(model) as meter:
        with recomputed(model):
            hidden = _read(model)
        kept = meter.live
        hidden.backward(torch.empty_like(hidden))
    for hook in hooks:
        hook.remove()
    return Activations(kept / sum(SEQUENCES), meter.peak / sum(SEQUENCES))


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def _loss(vocabulary: int, objective: Objective) -> tuple[float, float]:
    """Return the bytes that one row of logits takes with all that is made of it, and those read and written of it."""
    with Meter() as meter:
        student, teacher = torch.empty(ROWS_IN_CACHE, vocabulary), torch.empty(ROWS_IN_CACHE, vocabulary)
        value_and_gradient(student, teacher, objective)
    return meter.peak / ROWS_IN_CACHE, meter.moved / ROWS_IN_CACHE
