"""Counted work against what torch counts in real passes, and the shares of a machine that it takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel, Qwen3Config

from kdctl.config.preset import QuantizeSection
from kdctl.config.resolve import load_preset
from kdctl.cost.duration import ADDED, RECEIVED, RECEIVED_FUSED, UPDATED, WRITTEN_BACK, WRITTEN_BACK_FUSED
from kdctl.cost.network import Meter, Network, look_at
from kdctl.cost.records import Rates
from kdctl.cost.work import Passes, Work, stretch
from kdctl.distill import shadow as module
from kdctl.distill.divergence import Objective, divergence
from kdctl.distill.optimizer import gradient_norm, make_optimizer, update
from kdctl.distill.shadow import make_shadow
from kdctl.model.activation_checkpointing import Checkpointing, recomputed, set_checkpointing
from kdctl.model.attention import Layout, RowCache, forward, use_layouts
from kdctl.model.configuration import read_config
from kdctl.model.head import Head
from kdctl.model.load import skeleton
from kdctl.quant.affine import Grid, QParams
from kdctl.quant.gptq import gptq
from kdctl.quant.methods import QUANTIZERS
from kdctl.quant.scales import hqq, minmax, quantize_weight
from kdctl.quant.two_sided import two_sided

GRID = QuantizeSection(group_size=32)
LENGTH, ROWS = 96, 3
RATES = Rates(
    name="made up",
    measured=False,
    products_per_s=1e12,
    reached=0.5,
    memory_bytes_per_s=1e11,
    operator_s=1e-6,
    network_bytes_per_s=1e10,
    disk_bytes_per_s=1e9,
)
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


class Counter(FlopCounterMode):
    """torch's counter, taught the kernel of attention on CPUs; of a causal product only half is computed."""

    def __init__(self):
        super().__init__(display=False, custom_mapping={ATTENTION: _attention, BACKWARD: _attention_backward})

    @property
    def products(self) -> float:
        """Return all operations, attention's halved."""
        counts = self.get_flop_counts()["Global"]
        attention = sum(count for operator, count in counts.items() if operator in (ATTENTION, BACKWARD))
        return self.get_total_flops() - attention / 2


@pytest.fixture(scope="module")
def network(tiny_dir: Path) -> Network:
    """Look at the tiny network."""
    return look_at(read_config(tiny_dir), GRID, torch.bfloat16, Objective())


def read(model: PreTrainedModel) -> Tensor:
    """Read sequences of one length."""
    ids, places = torch.zeros(ROWS * LENGTH, dtype=torch.int64), torch.arange(LENGTH).repeat(ROWS)
    return forward(use_layouts(model), ids, places, Layout((LENGTH,) * ROWS))


def test_a_forward_pass_has_the_operations_that_torch_counts(network: Network, teacher: PreTrainedModel) -> None:
    with torch.no_grad(), Counter() as counter:
        read(teacher)
    assert Passes(network).forward(ROWS * LENGTH, LENGTH).products == counter.products


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_training_has_the_operations_that_torch_counts(
    network: Network, teacher: PreTrainedModel, how: Checkpointing
) -> None:
    for name in network.layers:
        teacher.get_parameter(f"{name}.weight").requires_grad_(True)
    set_checkpointing(teacher, how)
    with Counter() as counter:
        with recomputed(teacher):
            hidden = read(teacher)
        hidden.backward(torch.ones_like(hidden))
    frozen = [name for name in network.layers if ".layers.0." in name and name.endswith(("q_proj", "k_proj", "v_proj"))]
    nothing_before = (
        2 * ROWS * LENGTH * sum(rows * columns for rows, columns in (network.layers[name] for name in frozen))
    )
    found = Passes(network).training(ROWS * LENGTH, LENGTH, how).products
    assert found == counter.products + nothing_before


def test_drawing_a_token_has_the_operations_that_torch_counts(network: Network, teacher: PreTrainedModel) -> None:
    cache, context = RowCache(ROWS, LENGTH), torch.full((ROWS,), LENGTH)
    cache.point(torch.arange(ROWS), context - 1)
    layout = Layout(cache=cache, counts=context, longest=LENGTH)
    with torch.no_grad(), Counter() as counter:
        hidden = forward(use_layouts(teacher), torch.zeros(ROWS, dtype=torch.int64), context - 1, layout)
        teacher.get_output_embeddings()(hidden)  # pyright: ignore[reportOptionalCall]
    attention = 4 * ROWS * LENGTH * network.attended
    found = Passes(network).decoding(ROWS, LENGTH, started=True).products
    counted = counter.get_total_flops()
    assert found in (counted, counted + attention)  # a kernel for which torch counts nothing


def test_a_divergence_takes_three_products_of_the_head(network: Network) -> None:
    states, head = torch.ones(8, network.hidden), Head(torch.ones(network.vocabulary, network.hidden))
    with Counter() as counter:
        divergence(states.requires_grad_(), states.detach(), head, Objective())
    assert Passes(network).head(8, 3).products == counter.products


@pytest.mark.slow
def test_operations_of_qwen3_4b_without_numbers() -> None:
    config = Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    network = look_at(config, QuantizeSection(), torch.bfloat16, Objective())
    bare = skeleton(config).to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = bare.to_empty(device="cpu").eval()
        with torch.no_grad(), Counter() as counter:
            read(model)
    assert Passes(network).forward(ROWS * LENGTH, LENGTH).products == counter.products
    assert network.attended == 36 * 32 * 128


@pytest.mark.parametrize("one_kernel", [False, True])
@pytest.mark.parametrize("train", ["weights", "lora", "scales"])
def test_bytes_that_gradients_and_write_backs_move(
    train: str, one_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Module()
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    model = torch.nn.ModuleDict({"up_proj": layer})
    grid = Grid(4, 128, False)
    weights = {"up_proj": quantize_weight(weight, minmax, grid, torch.bfloat16)}
    settings = load_preset("smoke", {"distill.train": train, "distill.lora_rank": 1}).distill
    settings = settings.model_copy(update={"lora_targets": ("*",)})
    shadow = make_shadow(settings, model, weights, model)
    shadow.last_pass = False
    kernels, gradient = [Kernels(), Kernels()], torch.ones_like(weight)
    with torch.no_grad(), Meter() as received:
        if one_kernel:
            monkeypatch.setattr(module, "fused", kernels[0].instead)
        shadow.receive("up_proj", gradient)
    with Meter() as written:
        if one_kernel:
            monkeypatch.setattr(module, "fused", kernels[1].instead)
        shadow.write_back()
    expected = (RECEIVED_FUSED, WRITTEN_BACK_FUSED) if one_kernel else (RECEIVED, WRITTEN_BACK)
    for meter, kernel, bytes_of in zip((received, written), kernels, expected, strict=True):
        assert (meter.moved + kernel.moved) / weight.numel() == pytest.approx(bytes_of[train], rel=0.1)
    if train == "weights":
        optimizer = make_optimizer(shadow, settings)
        shadow.receive("up_proj", torch.ones_like(weight))  # makes the sum float32
        with torch.no_grad(), Meter() as again:
            shadow.receive("up_proj", gradient)
        assert again.moved - received.moved == pytest.approx(ADDED * weight.numel(), rel=0.1)
        with Meter() as updated:
            gradient_norm(shadow.parameters())
            update(optimizer, shadow.parameters(), 1.0)
        written_in_place = 4 * 4  # by fused AdamW and by what scales gradients, which return nothing
        assert updated.moved / weight.numel() + written_in_place == pytest.approx(UPDATED, rel=0.1)


class Kernels:
    """Runs functions as one kernel each would: what it is given is read, and what it gives and changes is written."""

    def __init__(self) -> None:
        self.moved = 0

    def instead(self, work: Any, _: Tensor) -> Any:
        """Take the place of ``fused``."""

        def run(changed: Tensor, *given: Any) -> Any:
            read = [changed] if work in (module.pass_through, module.scaled_inside, module.code_slope) else []
            for one in given:
                read += [one] if isinstance(one, Tensor) else []
                read += [one.scale, one.zero_point] if isinstance(one, QParams) else []
            with _disable_current_modes():
                result = work(changed, *given)
            written = [result] if isinstance(result, Tensor) else [changed]
            self.moved += sum(tensor.nbytes for tensor in (*read, *written))
            return result

        return run


@pytest.mark.parametrize("method", ["minmax", "hqq", "gptq", "kl"])
@pytest.mark.parametrize(("rows", "columns", "group"), [(256, 256, 64), (128, 512, 128)])
def test_bytes_and_operators_of_rounding(method: str, rows: int, columns: int, group: int) -> None:
    generator, grid = torch.Generator().manual_seed(0), Grid(4, group, False)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    hessian, fisher = (torch.randn(n, 2 * n, generator=generator) for n in (columns, rows))
    hessian, fisher = hessian @ hessian.T, fisher @ fisher.T
    do: dict[str, Any] = {
        "minmax": lambda: quantize_weight(weight, minmax, grid, torch.bfloat16),
        "hqq": lambda: quantize_weight(weight, hqq, grid, torch.bfloat16),
        "gptq": lambda: gptq(weight, hessian, grid, torch.bfloat16, 0.02),
        "kl": lambda: two_sided(weight, hessian, [fisher], grid, torch.bfloat16, 0.02, 0.2),
    }
    with Meter() as meter:
        do[method]()
    moved, started = QUANTIZERS[method].rounding(QuantizeSection(group_size=group), {"layer": (rows, columns)})
    assert meter.moved == pytest.approx(moved, rel=0.25)
    assert meter.operators == pytest.approx(started, rel=0.15)


def test_the_slowest_part_decides_and_works_add_up() -> None:
    first, second = Work(products=1e12, moved=1e11, times=2), Work(sent=5e9, stored=1e9)
    found = stretch("both", (first, second), RATES)
    assert found.parts_s == {"products": 4.0, "disk": 1.0}
    assert (found.seconds_s, found.limit) == (5.0, "products")
    assert stretch("both", (first.repeated(3),), RATES).seconds_s == 12.0
