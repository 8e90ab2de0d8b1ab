"""The optimizer step in pieces is the whole one; what lives long lies together."""

import copy

import pytest
import torch
from torch import nn

from kdctl.config.preset import DistillSection
from kdctl.distill.optimizer import TOGETHER, gradient_norm, make_optimizer, update
from kdctl.distill.shadow import ShadowWeights
from kdctl.quant.affine import Grid
from kdctl.quant.scales import minmax, quantize_weight

LAYERS = [str(index) for index in range(TOGETHER + 5)]


def shadow_of(learn_scales: bool = False, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ShadowWeights]:
    """Build a student of many small layers and what trains it."""
    torch.manual_seed(0)
    teacher = nn.ModuleDict({name: nn.Linear(32, 8, bias=False, dtype=dtype) for name in LAYERS})
    student = copy.deepcopy(teacher)
    grid = Grid(4, 32, False)
    values = {name: teacher.get_parameter(f"{name}.weight").detach() for name in LAYERS}
    weights = {name: quantize_weight(value, minmax, grid, dtype) for name, value in values.items()}
    shadow = ShadowWeights(student, weights, teacher, learn_scales)
    shadow.write_back()
    return student, shadow


def give_gradients(shadow: ShadowWeights, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in shadow.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_a_step_in_pieces_is_a_step_with_clipping_of_torch(limit: float) -> None:
    settings = DistillSection(lr=1e-2, weight_decay=0.1, learn_scales=True)
    (_, ours), (_, theirs) = shadow_of(True), shadow_of(True)
    optimizer = make_optimizer(ours, settings)
    reference = torch.optim.AdamW(
        [
            {"params": [p for name, p in theirs.trained.items() if name.endswith("master")]},
            {"params": [p for name, p in theirs.trained.items() if name.endswith("scale")], "weight_decay": 0.0},
        ],
        lr=1e-2,
        weight_decay=0.1,
        fused=True,
    )
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        norm = gradient_norm(ours.parameters())
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        assert norm == pytest.approx(float(expected), rel=1e-5)
        update(optimizer, ours.parameters(), min(1.0, limit / (norm + 1e-6)))
        reference.step()
    assert all(parameter.grad is None for parameter in ours.parameters())
    for name, parameter in theirs.trained.items():
        torch.testing.assert_close(ours.trained[name], parameter, rtol=1e-5, atol=1e-6)
        if limit > 1:
            assert torch.equal(ours.trained[name], parameter), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_gradients_are_updated_in_one_call_and_few_are_made_of_others(dtype: torch.dtype) -> None:
    _, shadow = shadow_of()
    optimizer = make_optimizer(shadow, DistillSection())
    for parameter in shadow.parameters():
        parameter.grad_dtype = None  # pyright: ignore[reportAttributeAccessIssue]
        parameter.grad = torch.ones_like(parameter, dtype=dtype)
    counts = []
    optimizer.register_step_pre_hook(
        lambda *_: counts.append(sum(parameter.grad is not None for parameter in shadow.parameters()))
    )
    update(optimizer, shadow.parameters(), 1.0)
    assert counts == ([len(LAYERS)] if dtype == torch.float32 else [TOGETHER, 5])


def test_a_lone_gradient_keeps_the_dtype_of_backward_and_a_sum_is_float32() -> None:
    student, shadow = shadow_of(dtype=torch.bfloat16)
    x = torch.randn(4, 32, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    kept = []
    for _ in range(2):
        sum(student[name](x).square().sum() for name in LAYERS).backward()  # pyright: ignore
        gradient = shadow.masters["0"].grad
        assert gradient is not None
        kept.append(gradient)
    assert [gradient.dtype for gradient in kept] == [torch.bfloat16, torch.float32]
    assert torch.equal(kept[1], 2 * kept[0].float())


def test_a_norm_of_bfloat16_gradients_is_that_of_their_values() -> None:
    _, shadow = shadow_of()
    parameter = shadow.parameters()[0]
    parameter.grad_dtype = None  # pyright: ignore[reportAttributeAccessIssue]
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert gradient_norm(shadow.parameters()) == pytest.approx(float(parameter.grad.double().norm()), rel=1e-6)


def test_masters_and_each_moment_lie_in_one_block() -> None:
    _, shadow = shadow_of()
    values = {name: parameter.detach().clone() for name, parameter in shadow.trained.items()}
    optimizer = make_optimizer(shadow, DistillSection())
    assert all(torch.equal(shadow.trained[name], value) for name, value in values.items())
    states = [optimizer.state[parameter] for parameter in shadow.parameters()]
    for tensors in (
        [parameter.data for parameter in shadow.parameters()],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
    ):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        assert len({tensor.data_ptr() for tensor in tensors}) == len(LAYERS)


def test_adafactor_learns_with_a_fraction_of_the_state() -> None:
    student, shadow = shadow_of()
    optimizer = make_optimizer(shadow, DistillSection(optimizer="adafactor", lr=0.05))
    x, losses = torch.linspace(-1, 1, 128).view(4, 32), []
    for _ in range(30):
        loss = torch.stack([student[name](x).square().sum() for name in LAYERS]).sum()  # pyright: ignore
        losses.append(float(loss.detach()))
        loss.backward()
        update(optimizer, shadow.parameters(), 1.0)
        shadow.write_back()
    assert losses[-1] < 0.5 * losses[0]
    state = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    assert state < 0.25 * sum(parameter.numel() for parameter in shadow.parameters())
