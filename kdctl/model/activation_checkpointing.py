"""Activation checkpointing: what backward needs of a decoder layer is computed again instead of kept.

``full`` keeps a layer's input and runs the whole layer again (Chen et al. 2016, section 4.1). ``selective`` also keeps
the results of its matrix products and attention, which cost nearly all the time, and repeats what lies between them.
Either way backward sees the same numbers to the bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from kdctl.model import varlen  # noqa: F401 - names its kernel
from kdctl.system.patches import checkpoint_layers

Checkpointing = Literal["none", "selective", "full"]
ATEN = torch.ops.aten
EXPENSIVE = frozenset(
    {
        ATEN.mm.default,
        ATEN.addmm.default,
        ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        ATEN._scaled_dot_product_flash_attention.default,
        ATEN._scaled_dot_product_efficient_attention.default,
        ATEN._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
    }
)


def _policy(_context: object, operator: object, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def set_checkpointing(model: nn.Module, how: Checkpointing) -> None:
    """Choose what ``recomputed`` keeps of a model's decoder layers; does nothing by itself."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if how == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    checkpoint_layers(model, None if how == "none" else again)


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Run forward passes as ``set_checkpointing`` chose.

    Layers do so in training mode only. Their parts stay in evaluation mode, and so do they while they compute: nothing
    is dropped.
    """
    layers = [layer for layer in _layers(model) if layer.gradient_checkpointing]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
