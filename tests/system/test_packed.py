"""Weights kept in the order of the CPU's products: the same numbers, and no trace afterwards."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from kdctl.system.packed import packed


class Network(nn.Module):
    """A linear layer with a bias, one without, and a norm between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(48, 80), nn.LayerNorm(80), nn.Linear(80, 96, bias=False)
        self.to(dtype)

    def forward(self, values: Tensor) -> Tensor:
        return self.last(self.norm(self.first(values)))


def inputs(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, 48, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("rows", [1, 4, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_numbers_are_those_of_the_float32_product_rounded_once(rows: int, dtype: torch.dtype) -> None:
    layer, values = Network(dtype).first, inputs(rows, dtype)
    with torch.inference_mode(), packed(layer):
        expected = linear(values.double(), layer.weight.double(), layer.bias.double())
        found = layer(values)
    assert found.dtype == dtype
    assert float((found - expected).abs().max() / expected.abs().max()) < (2**-8 if dtype == torch.bfloat16 else 1e-6)


def test_half_precision_layers_are_packed_and_float32_ones_are_not() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        network = Network(dtype)
        with packed(network):
            assert ["forward" in vars(layer) for layer in (network.first, network.norm, network.last)] == [
                dtype == torch.bfloat16,
                False,
                dtype == torch.bfloat16,
            ]


def test_a_linear_layer_with_a_product_of_its_own_keeps_it() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = Doubled(48, 8, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = layer(inputs(3, torch.bfloat16))
        with packed(layer):
            assert torch.equal(layer(inputs(3, torch.bfloat16)), expected)


def test_packed_weights_are_used() -> None:
    network = Network(torch.bfloat16)
    values = inputs(4, torch.bfloat16)
    with torch.inference_mode(), packed(network):
        before = network(values)
        network.last.weight.zero_()
        assert torch.equal(network(values), before)  # what changes until the end is not seen
    assert not network(values).any()


def test_the_model_is_as_it_was_also_after_an_error(teacher: PreTrainedModel) -> None:
    ids = torch.arange(3, 30).unsqueeze(0)
    expected = teacher(ids).logits
    with pytest.raises(RuntimeError, match="stop"), packed(teacher):
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in teacher.modules() if isinstance(module, nn.Linear))
    assert torch.equal(teacher(ids).logits, expected)


def test_a_whole_network_agrees_with_its_unpacked_self(teacher: PreTrainedModel) -> None:
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.inference_mode():
        expected = teacher(ids).logits
        with packed(teacher):
            found = teacher(ids).logits
    assert float((found - expected).abs().max()) <= 0.25  # a bfloat16 step of logits this large
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
