"""Widened half-precision products: float32 products, rounded once; all else is left alone."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import PreTrainedModel

from kdctl.model import load
from kdctl.model.load import ready
from kdctl.system import cpu_products
from kdctl.system.cpu_products import packed

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """Register the kernels whatever this machine can do; lists the dtypes of what they widened."""
    seen = []
    original = cpu_products._wide

    def noted(value: object) -> object:
        seen.append(value.dtype if isinstance(value, Tensor) else None)
        return original(value)

    monkeypatch.setattr(cpu_products, "_wide", noted)
    library = cpu_products.register(frozenset(HALF))
    assert library is not None
    yield seen
    library._destroy()


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(work: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return a result and its gradients, the result's own gradient being fixed numbers."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = work(*leaves)
    result.backward(numbers(*result.shape, seed=9, dtype=result.dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def rounded_once(work: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Do in float32 what ``with_gradients`` does, on the same numbers, and round what comes out."""
    wide = [tensor.float().requires_grad_() for tensor in inputs]
    result = work(*wide)
    gradient = numbers(*result.shape, seed=9, dtype=inputs[0].dtype)
    result.backward(gradient.float())
    return [part.to(inputs[0].dtype) for part in (result.detach(), *(leaf.grad for leaf in wide)) if part is not None]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_and_its_gradients_are_rounded_once(widened: list, dtype: torch.dtype, bias: bool) -> None:
    inputs = [numbers(7, 32, dtype=dtype), numbers(24, 32, seed=1, dtype=dtype)]
    inputs += [numbers(24, seed=2, dtype=dtype)] if bias else []
    expected = rounded_once(linear, *inputs)
    found = with_gradients(linear, *inputs)
    assert len(found) == 3 + bias
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    assert widened.count(dtype) >= 3  # one factor of each of three products, at least


@pytest.mark.parametrize(("rows", "inner", "columns"), [(3, 8, 100), (3, 100, 8), (5, 30, 30)])
def test_a_large_second_factor_is_multiplied_in_blocks(
    widened: list, monkeypatch: pytest.MonkeyPatch, rows: int, inner: int, columns: int
) -> None:
    monkeypatch.setattr(cpu_products, "BLOCK", 240)
    first, second = numbers(rows, inner), numbers(inner, columns, seed=1)
    expected = first.double() @ second.double()
    found = first @ second
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < 2**-8
    assert widened == [torch.bfloat16] * 4  # blocks


def test_a_batch_of_products_is_rounded_once(widened: list) -> None:
    inputs = numbers(3, 5, 16), numbers(3, 16, 8, seed=1)
    found, expected = with_gradients(torch.bmm, *inputs), rounded_once(torch.bmm, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.bfloat16 in widened


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_float32_inside(widened: list, masked: bool) -> None:
    seen = numbers(1, 1, 6, 6, seed=4) > -1.0 if masked else None

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = seen if seen is None else seen | torch.eye(6, dtype=torch.bool)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=not masked)

    inputs = [numbers(1, 2, 6, 16, seed=seed) for seed in range(3)]
    found, expected = with_gradients(attention, *inputs), rounded_once(attention, *inputs)
    assert torch.equal(found[0], expected[0])
    for gradient, reference in zip(found[1:], expected[1:], strict=True):  # backward reads the result, rounded
        assert torch.allclose(gradient.float(), reference.float(), atol=0.02, rtol=0.02)
    assert torch.bfloat16 in widened


def test_what_attention_keeps_for_its_backward_pass_is_not_rounded(widened: list) -> None:
    query, key, value = (numbers(1, 2, 6, 16, seed=seed) for seed in range(3))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    scores = query.float() @ key.float().mT / 16**0.5
    assert found[1].dtype == torch.float32
    assert torch.allclose(found[1], scores.logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_formats_are_not_touched(widened: list, dtype: torch.dtype) -> None:
    found = linear(numbers(7, 32, dtype=dtype), numbers(24, 32, seed=1, dtype=dtype))
    assert found.dtype == dtype
    assert widened == []


def test_torchs_kernels_are_back_when_it_is_over() -> None:
    inputs = numbers(7, 32, dtype=torch.float64) / 3, numbers(32, 5, seed=1, dtype=torch.float64) / 3
    exact = inputs[0] @ inputs[1]
    library = cpu_products.register(frozenset([torch.float64]))  # a format in which going through float32 shows
    assert library is not None
    assert not torch.equal(inputs[0] @ inputs[1], exact)
    library._destroy()
    assert torch.equal(inputs[0] @ inputs[1], exact)


def test_nothing_is_replaced_where_the_cpu_can() -> None:
    assert cpu_products.register(frozenset()) is None


def test_a_model_on_a_cpu_is_made_ready_with_fast_products(
    teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(load, "widen_products", called.append)
    ready(teacher, torch.device("cpu"))
    assert called == [teacher.dtype]


def test_kernels_are_replaced_for_a_format_that_is_slow_and_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []
    monkeypatch.setattr(cpu_products, "slow_dtypes", lambda: frozenset([torch.float16]))
    monkeypatch.setattr(cpu_products, "register", replaced.append)
    monkeypatch.setattr(cpu_products, "_widen_all", cache(cpu_products._widen_all.__wrapped__))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float16):
        cpu_products.widen_products(dtype)
        assert replaced == [frozenset([torch.float16])] * (dtype == torch.float16)


# --- weights kept in the order of the products ------------------------------------------------------------------------


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
