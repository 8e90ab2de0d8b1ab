"""Activation checkpointing changes nothing but what is kept."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdctl.model.activation_checkpointing import Checkpointing, recomputed, set_checkpointing
from kdctl.model.attention import Layout, forward
from tests.model.test_attention import KINDS

LENGTHS = (7, 3, 12)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def model_of(kind: str, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(KINDS[kind])  # a model built from a configuration leaves its dtype there
    config.attention_dropout = dropout
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def run(model: PreTrainedModel, how: Checkpointing) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return final hidden states, all gradients, and the matrix products of the backward pass."""
    set_checkpointing(model, how)
    model.zero_grad()
    ids = torch.randint(3, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    with recomputed(model):
        hidden = forward(model, ids, places, Layout(LENGTHS))
    with Products() as products:
        hidden.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), {name: gradient.clone() for name, gradient in gradients.items()}, products.count


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_is_the_same_to_the_bit(kind: str) -> None:
    model = model_of(kind)
    hidden, expected, products = run(model, "none")
    assert len(expected) > 10
    for how in ("selective", "full"):
        again, found, more = run(model, how)
        assert torch.equal(again, hidden)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), how
        assert (more > products) == (how == "full")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("llama", "opt"))])
def test_nothing_is_dropped_in_layers_that_are_recomputed(kind: str) -> None:
    model = model_of(kind, dropout=0.5)
    with torch.no_grad():
        places = torch.cat([torch.arange(length) for length in LENGTHS])
        ids = torch.randint(3, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
        evaluated = forward(model, ids, places, Layout(LENGTHS))
    for how in ("none", "selective", "full"):
        assert torch.equal(run(model, how)[0], evaluated)


def test_the_model_is_in_evaluation_mode_again_afterwards() -> None:
    model = model_of("llama")
    set_checkpointing(model, "full")
    with pytest.raises(RuntimeError, match="stop"), recomputed(model):
        raise RuntimeError("stop")
    assert not any(module.training for module in model.modules())
