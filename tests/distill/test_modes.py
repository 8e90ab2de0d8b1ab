"""The training modes: gradients of every receiver against float64 autograd, and where each starts and ends."""

import math

import pytest
import torch
from torch import Tensor, nn

from kdctl.base.errors import PresetError
from kdctl.config.preset import DistillSection
from kdctl.distill.shadow import Shadow, ShadowLora, ShadowScales, ShadowWeights, make_shadow
from kdctl.quant.affine import Grid, QuantizedWeight, dequantize, grouped, quantize
from kdctl.quant.scales import minmax, quantize_weight

MODES = {
    "weights": DistillSection(),
    "weights + scales": DistillSection(learn_scales=True),
    "lora": DistillSection(train="lora", lora_rank=4, lora_targets=("*",)),
    "scales": DistillSection(train="scales"),
}


def layer(seed: int = 0) -> tuple[nn.ModuleDict, nn.ModuleDict, dict[str, QuantizedWeight]]:
    """Build a one-layer teacher and student, float32, with a grid that clamps some weights."""
    torch.manual_seed(seed)
    teacher, student = (nn.ModuleDict({"a": nn.Linear(64, 24, bias=False)}) for _ in range(2))
    weight = quantize_weight(teacher.get_parameter("a.weight").detach(), minmax, Grid(4, 32, False), torch.float32)
    narrow = QuantizedWeight(
        weight.codes, type(weight.qparams)(weight.qparams.scale * 0.8, weight.qparams.zero_point), weight.grid
    )
    codes = quantize(teacher.get_parameter("a.weight").detach(), narrow.qparams, narrow.grid)
    return teacher, student, {"a": QuantizedWeight(codes, narrow.qparams, narrow.grid)}


def loss_of(weight: Tensor, seed: int = 1) -> Tensor:
    """Return a smooth function of a layer's weight, in the weight's dtype."""
    x = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
    return (x @ weight.T).tanh().square().sum()


def backward(shadow: Shadow, student: nn.ModuleDict) -> None:
    """Write Q(W) into the student and send the loss's gradient to the receiver."""
    shadow.write_back()
    loss_of(student.get_parameter("a.weight")).backward()


def straight_through(master: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Fake-quantize in float64 with the straight-through estimator spelled out by detaching."""
    position = grouped(master, grid.group_size) / scale.unsqueeze(-1) + zero.unsqueeze(-1)
    rounded = position + (position.round() - position).detach()
    clamped = rounded.clamp(0, grid.max_code)
    return ((clamped - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)


def leaves(weights: dict[str, QuantizedWeight]) -> tuple[Tensor, Tensor, Grid]:
    """Return a layer's scale and zero point in float64."""
    found = weights["a"]
    return found.qparams.scale.double().requires_grad_(), found.qparams.zero_point.double(), found.grid


def test_weights_and_scales_together_equal_float64_autograd() -> None:
    teacher, student, weights = layer()
    shadow = ShadowWeights(student, weights, teacher, learn_scales=True)
    backward(shadow, student)
    scale, zero, grid = leaves(weights)
    master = shadow.masters["a"].detach().double().requires_grad_()
    loss_of(straight_through(master, scale, zero, grid)).backward()
    assert scale.grad is not None
    torch.testing.assert_close(shadow.masters["a"].grad, master.grad, check_dtype=False, rtol=1e-4, atol=1e-5)
    expected = scale.grad * scale.detach()
    torch.testing.assert_close(shadow.trained["a.log_scale"].grad, expected, check_dtype=False, rtol=1e-3, atol=1e-4)


def test_lora_factors_equal_float64_autograd_inside_the_rounding() -> None:
    teacher, student, weights = layer()
    shadow = ShadowLora(student, weights, teacher, MODES["lora"])
    with torch.no_grad():
        shadow.trained["a.lora_b"].normal_(std=0.02, generator=torch.Generator().manual_seed(3))
    backward(shadow, student)
    a, b = (shadow.trained[f"a.lora_{k}"].detach().double().requires_grad_() for k in "ab")
    scale, zero, grid = leaves(weights)
    base = teacher.get_parameter("a.weight").detach().double()
    loss_of(straight_through(base + 2.0 * b @ a, scale.detach(), zero, grid)).backward()
    torch.testing.assert_close(shadow.trained["a.lora_a"].grad, a.grad, check_dtype=False, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shadow.trained["a.lora_b"].grad, b.grad, check_dtype=False, rtol=1e-3, atol=1e-4)


def test_scales_with_frozen_codes_equal_float64_autograd() -> None:
    _, student, weights = layer()
    shadow = ShadowScales(student, weights)
    backward(shadow, student)
    scale, zero, grid = leaves(weights)
    codes = grouped(weights["a"].codes.double(), grid.group_size)
    loss_of(((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)).backward()
    assert scale.grad is not None
    expected = scale.grad * scale.detach()
    torch.testing.assert_close(shadow.trained["a.log_scale"].grad, expected, check_dtype=False, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("codes", ["nearest", "others"])
def test_step_zero_is_the_quantized_model_whatever_chose_the_codes(mode: str, codes: str) -> None:
    teacher, student, weights = layer()
    if codes == "others":
        flipped = (weights["a"].codes.int() + torch.randint(-1, 2, weights["a"].codes.shape)).clamp(0, 15)
        weights = {"a": QuantizedWeight(flipped.to(torch.uint8), weights["a"].qparams, weights["a"].grid)}
    shadow = make_shadow(MODES[mode], student, weights, teacher)
    shadow.write_back()
    found = dict(shadow.quantized())["a"]
    assert torch.equal(found.codes, weights["a"].codes)
    assert torch.equal(found.qparams.scale, weights["a"].qparams.scale)
    expected = dequantize(weights["a"].codes, weights["a"].qparams, weights["a"].grid)
    assert torch.equal(student.get_parameter("a.weight"), expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_lowers_the_loss_and_ends_on_the_grid(mode: str) -> None:
    teacher, student, weights = layer()
    shadow = make_shadow(MODES[mode], student, weights, teacher)
    optimizer = torch.optim.AdamW(shadow.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        backward(shadow, student)
        losses.append(float(loss_of(student.get_parameter("a.weight")).detach()))
        optimizer.step()
        optimizer.zero_grad()
    shadow.write_back()
    assert losses[-1] < 0.9 * losses[0]
    found = dict(shadow.quantized())["a"]
    assert torch.equal(student.get_parameter("a.weight"), dequantize(found.codes, found.qparams, found.grid))
    assert bool((found.qparams.scale > 0).all())
    if mode == "scales":
        assert torch.equal(found.codes, weights["a"].codes)


def test_lora_shares_the_teachers_weight_and_leaves_other_layers_alone() -> None:
    torch.manual_seed(0)
    teacher, student = (nn.ModuleDict({k: nn.Linear(32, 8, bias=False) for k in "ab"}) for _ in range(2))
    grid = Grid(4, 32, False)
    weights = {
        k: quantize_weight(teacher.get_parameter(f"{k}.weight").detach(), minmax, grid, torch.float32) for k in "ab"
    }
    shadow = ShadowLora(student, weights, teacher, DistillSection(train="lora", lora_targets=("a",)))
    assert shadow._frozen["a"].data_ptr() == teacher.get_parameter("a.weight").data_ptr()
    assert set(shadow.trained) == {"a.lora_a", "a.lora_b"}
    assert torch.equal(dict(shadow.quantized())["b"].codes, weights["b"].codes)


def test_a_lora_target_that_matches_nothing_is_refused() -> None:
    teacher, student, weights = layer()
    with pytest.raises(PresetError, match="nowhere"):
        ShadowLora(student, weights, teacher, DistillSection(train="lora", lora_targets=("nowhere",)))


@pytest.mark.parametrize("mode", MODES)
def test_trained_norms_are_the_students_own_in_every_mode(mode: str) -> None:
    teacher, student, weights = layer()
    teacher["norm"], student["norm"] = nn.LayerNorm(8), nn.LayerNorm(8)
    shared = teacher.get_parameter("norm.weight")
    student.get_submodule("norm").register_parameter("weight", shared)
    shadow = make_shadow(MODES[mode].model_copy(update={"train_norms": True}), student, weights, teacher)
    shadow.write_back()
    assert torch.equal(student.get_parameter("norm.weight"), torch.ones(8))
    student["norm"](torch.randn(4, 8)).square().sum().backward()
    assert shared.grad is None
    assert shadow.trained["norm.weight.log_gain"].grad is not None
    with torch.no_grad():
        shadow.trained["norm.weight.log_gain"].add_(math.log(2.0))
    for _ in range(2):  # each time from where it began
        shadow.write_back()
    torch.testing.assert_close(student.get_parameter("norm.weight"), torch.full((8,), 2.0))
    assert torch.equal(teacher.get_parameter("norm.weight"), torch.ones(8))
    shadow.detach()
    assert not student.get_parameter("norm.weight").requires_grad


class FromOne(nn.Module):
    """A norm that counts its weight from one, as in the Gemma family."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 2.0, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


@pytest.mark.parametrize(("norm", "added"), [(nn.RMSNorm, 0.0), (nn.LayerNorm, 0.0), (FromOne, 1.0)])
def test_a_norms_gain_learns_by_float64_autograd_and_starts_where_it_was(norm: type[nn.Module], added: float) -> None:
    _, student, weights = layer()
    student["norm"] = norm(8)
    with torch.no_grad():
        student.get_parameter("norm.weight").add_(torch.linspace(-0.3, 0.3, 8))
    start = student.get_parameter("norm.weight").detach().clone()
    shadow = ShadowScales(student, weights, train_norms=True)
    shadow.write_back()
    assert torch.equal(student.get_parameter("norm.weight"), start)
    x, moved = torch.randn(5, 8), torch.linspace(-0.1, 0.2, 8)
    with torch.no_grad():
        shadow.trained["norm.weight.log_gain"].copy_(moved)
    shadow.write_back()
    student["norm"](x).tanh().sum().backward()
    log_gain = moved.double().requires_grad_()
    weight = (start.double() + added) * log_gain.exp() - added
    torch.func.functional_call(student["norm"].double(), {"weight": weight}, (x.double(),)).tanh().sum().backward()
    torch.testing.assert_close(
        shadow.trained["norm.weight.log_gain"].grad, log_gain.grad, check_dtype=False, rtol=1e-4, atol=1e-5
    )


def test_lora_on_other_codes_keeps_its_base_in_the_teachers_dtype() -> None:
    torch.manual_seed(0)
    teacher, student = (nn.ModuleDict({"a": nn.Linear(32, 8, bias=False, dtype=torch.bfloat16)}) for _ in range(2))
    nearest = quantize_weight(teacher.get_parameter("a.weight").detach(), minmax, Grid(4, 32, False), torch.bfloat16)
    codes = (nearest.codes.int() + torch.randint(-1, 2, nearest.codes.shape)).clamp(0, 15).to(torch.uint8)
    weights = {"a": QuantizedWeight(codes, nearest.qparams, nearest.grid)}
    shadow = make_shadow(MODES["lora"], student, weights, teacher)
    assert isinstance(shadow, ShadowLora)
    assert shadow._frozen["a"].dtype == torch.bfloat16
    assert torch.equal(dict(shadow.quantized())["a"].codes, codes)
    kept = codes == nearest.codes
    assert torch.equal(shadow._frozen["a"][kept], teacher.get_parameter("a.weight")[kept])
