"""Shadow weights: exact at step 0, straight-through gradients as float64 autograd has them, nothing left behind."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from kdctl.config.preset import DistillSection, QuantizeSection
from kdctl.distill.optimizer import make_optimizer, update
from kdctl.distill.shadow import ShadowWeights
from kdctl.formats.student import Student
from kdctl.quant.affine import QParams, QuantizedWeight, dequantize, grouped, inside, quantize
from kdctl.quant.apply import build_student, dense

Quantized = Callable[[PreTrainedModel, QuantizeSection], Student]
SETTINGS = QuantizeSection(bits=4, group_size=16, method="minmax")
KINDS = [(method, symmetric) for method in ("minmax", "hqq") for symmetric in (False, True)]


def token_ids(seed: int) -> Tensor:
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(logits: Tensor, seed: int) -> Tensor:
    """Weigh logits at random: a loss whose gradient reaches every layer."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
    return (logits.double() * weights).sum() / 100


def narrow(weights: dict[str, QuantizedWeight], teacher: PreTrainedModel) -> dict[str, QuantizedWeight]:
    """Halve the scales, so that many of the teacher's weights are clamped."""
    found = {}
    for name, weight in weights.items():
        qparams = QParams(weight.qparams.scale * 0.5, weight.qparams.zero_point)
        codes = quantize(teacher.get_parameter(f"{name}.weight").detach(), qparams, weight.grid)
        found[name] = QuantizedWeight(codes, qparams, weight.grid)
    return found


def straight_through(master: Tensor, weight: QuantizedWeight) -> Tensor:
    """Write Q(master) with its straight-through gradient out in float64."""
    scale, zero = weight.qparams.scale.double().unsqueeze(-1), weight.qparams.zero_point.unsqueeze(-1)
    groups = grouped(master, weight.grid.group_size)
    free = (groups / scale + zero).round()
    hard = ((free.clamp(0, weight.grid.max_code) - zero) * scale).detach()
    passing = torch.where((free >= 0) & (free <= weight.grid.max_code), groups, hard)
    return (passing + (hard - passing).detach()).flatten(-2)


def reference_gradients(
    teacher: PreTrainedModel, weights: dict[str, QuantizedWeight], masters: dict[str, Tensor], seeds: list[int]
) -> dict[str, Tensor]:
    """Differentiate the summed loss of a float64 model by its masters."""
    model = copy.deepcopy(teacher).double()
    leaves = {name: master.detach().double().requires_grad_() for name, master in masters.items()}
    losses = []
    for seed in seeds:
        q = {f"{name}.weight": straight_through(leaf, weights[name]) for name, leaf in leaves.items()}
        losses.append(loss_of(functional_call(model, q, (token_ids(seed),)).logits, seed))
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("symmetric", [False, True])
def test_master_gradients_are_those_of_straight_through_autograd(
    teacher_fp32: PreTrainedModel, quantized: Quantized, symmetric: bool
):
    settings = SETTINGS.model_copy(update={"symmetric": symmetric})
    weights = narrow(quantized(teacher_fp32, settings).weights, teacher_fp32)
    student = build_student(teacher_fp32, weights)
    shadow = ShadowWeights(student, weights, teacher_fp32)
    assert len(shadow.masters) == 14
    for seed in (0, 1):
        loss_of(student(token_ids(seed)).logits, seed).backward()
        assert all(parameter.grad is None for parameter in student.parameters())

    expected = reference_gradients(teacher_fp32, weights, dict(shadow.masters), [0, 1])
    for name, master in shadow.masters.items():
        found = master.grad
        assert found is not None
        assert found.dtype == torch.float32
        clamped = ~inside(master, weights[name].qparams, weights[name].grid)
        assert 0.05 < clamped.float().mean() < 0.95, name
        assert (found[clamped] == 0).all(), name
        assert (found[~clamped] != 0).any(), name
        distance = torch.linalg.vector_norm(found - expected[name]) / torch.linalg.vector_norm(expected[name])
        assert distance < 1e-4, name


def test_two_backward_passes_add_up(teacher_fp32: PreTrainedModel, quantized: Quantized):
    student = quantized(teacher_fp32, SETTINGS)
    shadow = ShadowWeights(student.model, student.weights, teacher_fp32)
    parts = []
    for seed in (0, 1):
        loss_of(student.model(token_ids(seed)).logits, seed).backward()
        parts.append({name: master.grad for name, master in shadow.masters.items()})
        for master in shadow.parameters():
            master.grad = None
    for seed in (0, 1):
        loss_of(student.model(token_ids(seed)).logits, seed).backward()
    for name, master in shadow.masters.items():
        assert master.grad is not None
        first, second = parts[0][name], parts[1][name]
        assert first is not None
        assert second is not None
        assert torch.equal(master.grad, first + second)


def test_a_gradient_may_take_the_place_of_its_weight_until_write_back(teacher: PreTrainedModel, quantized: Quantized):
    found = []
    for spend in (False, True):
        student = quantized(teacher, SETTINGS)
        shadow = ShadowWeights(student.model, student.weights, teacher)
        shadow.last_pass = spend
        before = {name: student.model.get_parameter(f"{name}.weight").clone() for name in shadow.masters}
        loss_of(student.model(token_ids(0)).logits, 0).backward()
        gradients = {name: master.grad for name, master in shadow.masters.items()}
        for name, gradient in gradients.items():
            weight = student.model.get_parameter(f"{name}.weight")
            assert gradient is not None
            assert (gradient.data_ptr() == weight.data_ptr()) == spend
        found.append({name: gradient.clone() for name, gradient in gradients.items() if gradient is not None})
        shadow.write_back()
        assert all(torch.equal(student.model.get_parameter(f"{name}.weight"), q) for name, q in before.items())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_only_masters_and_quantized_layers_take_gradients(teacher: PreTrainedModel, quantized: Quantized):
    student = quantized(teacher, SETTINGS)
    student.model.requires_grad_(True)
    shadow = ShadowWeights(student.model, student.weights, teacher)
    loss_of(student.model(token_ids(0)).logits, 0).backward()
    assert all(parameter.grad is None for parameter in student.model.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert [master.dtype for master in shadow.parameters()] == [torch.float32] * 14
    for master in shadow.parameters():
        assert master.grad is not None
        assert master.grad.dtype == torch.bfloat16
        assert torch.isfinite(master.grad).all()
    trained = {name for name, parameter in student.model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.weight" for name in student.weights}


@pytest.mark.parametrize(("method", "symmetric"), KINDS)
def test_step_0_is_the_stored_student(teacher: PreTrainedModel, quantized: Quantized, method: str, symmetric: bool):
    settings = QuantizeSection.model_validate({"group_size": 16, "method": method, "symmetric": symmetric})
    student = quantized(teacher, settings)
    shadow = ShadowWeights(student.model, student.weights, teacher)
    found = dict(shadow.quantized())
    assert found.keys() == student.weights.keys()
    for name, weight in student.weights.items():
        assert torch.equal(found[name].codes, weight.codes)
        assert torch.equal(student.model.get_parameter(f"{name}.weight"), dense(weight))


def test_step_0_is_the_stored_student_whatever_its_codes(teacher: PreTrainedModel, quantized: Quantized):
    weights = quantized(teacher, SETTINGS).weights
    random = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        codes = torch.randint(0, 16, weight.codes.shape, generator=random, dtype=torch.uint8)
        weights[name] = QuantizedWeight(codes, weight.qparams, weight.grid)
    shadow = ShadowWeights(build_student(teacher, weights), weights, teacher)
    for name, weight in shadow.quantized():
        assert torch.equal(weight.codes, weights[name].codes)


@pytest.mark.parametrize(("method", "symmetric"), KINDS)
def test_a_step_with_learning_rate_0_changes_nothing(
    teacher: PreTrainedModel, quantized: Quantized, method: str, symmetric: bool
):
    settings = QuantizeSection.model_validate({"group_size": 16, "method": method, "symmetric": symmetric})
    student = quantized(teacher, settings)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    shadow = ShadowWeights(student.model, student.weights, teacher)
    optimizer = make_optimizer(shadow, DistillSection(lr=1.0, weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    loss_of(student.model(token_ids(0)).logits, 0).backward()
    assert any((master.grad != 0).any() for master in shadow.parameters())
    update(optimizer, shadow.parameters(), 1.0)
    shadow.write_back()
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_real_step_changes_only_quantized_layers(teacher: PreTrainedModel, quantized: Quantized):
    student = quantized(teacher, SETTINGS)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    shadow = ShadowWeights(student.model, student.weights, teacher)
    loss_of(student.model(token_ids(0)).logits, 0).backward()
    update(make_optimizer(shadow, DistillSection(lr=0.02)), shadow.parameters(), 1.0)
    shadow.write_back()
    changed = {name for name, tensor in student.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in student.weights}


def test_codes_come_from_masters_and_write_back_puts_them_into_the_student(
    teacher: PreTrainedModel, quantized: Quantized
):
    student = quantized(teacher, SETTINGS)
    shadow = ShadowWeights(student.model, student.weights, teacher)
    with torch.no_grad():
        for name in student.weights:
            student.model.get_parameter(f"{name}.weight").fill_(7.0)
    for name, weight in shadow.quantized():
        assert torch.equal(weight.codes, student.weights[name].codes)
    shadow.write_back()
    for name, weight in student.weights.items():
        assert torch.equal(student.model.get_parameter(f"{name}.weight"), dense(weight))


def test_steps_smaller_than_a_cell_add_up(teacher: PreTrainedModel, quantized: Quantized):
    student = quantized(teacher, SETTINGS)
    shadow = ShadowWeights(student.model, student.weights, teacher)
    name, weight = next(iter(student.weights.items()))
    step = weight.qparams.scale.float().repeat_interleave(16, 1)
    middle = QuantizedWeight(weight.codes.clamp(max=14), weight.qparams, weight.grid)
    parameter = student.model.get_parameter(f"{name}.weight")
    with torch.no_grad():
        exact = QParams(weight.qparams.scale.float(), weight.qparams.zero_point)
        shadow.masters[name].copy_(dequantize(middle.codes, exact, weight.grid))
        for moved in (0, 0, 1):
            shadow.write_back()
            expected = QuantizedWeight(middle.codes + moved, weight.qparams, weight.grid)
            assert torch.equal(parameter, dense(expected))
            shadow.masters[name].add_(0.3 * step)


def test_masters_start_at_the_teacher_where_it_rounds_to_its_code(teacher: PreTrainedModel, quantized: Quantized):
    student = quantized(teacher, SETTINGS)
    shadow = ShadowWeights(student.model, student.weights, teacher)
    for name, master in shadow.masters.items():
        assert torch.equal(master, teacher.get_parameter(f"{name}.weight").float())


def test_masters_start_where_the_weights_were_rounded_if_that_is_known(teacher: PreTrainedModel, quantized: Quantized):
    student = quantized(teacher, SETTINGS)
    known = {
        name: replace(weight, offsets=torch.full_like(weight.codes, 100).to(torch.int8))
        for name, weight in student.weights.items()
    }
    shadow = ShadowWeights(student.model, known, teacher)
    for name, weight in shadow.quantized():
        assert torch.equal(weight.codes, student.weights[name].codes)
        assert weight.offsets is None
        scale = weight.qparams.scale.float().repeat_interleave(weight.grid.group_size, 1)
        away = shadow.masters[name] - dense(weight).float()
        torch.testing.assert_close(
            away / scale, torch.full_like(away, 100 / 256), rtol=0, atol=0.06
        )  # Q(W) is bfloat16


def test_detach_removes_the_hooks_and_freezes_the_student(teacher: PreTrainedModel, quantized: Quantized):
    student = quantized(teacher, SETTINGS)
    shadow = ShadowWeights(student.model, student.weights, teacher)
    shadow.detach()
    assert not any(parameter.requires_grad for parameter in student.model.parameters())
    for name in student.weights:
        student.model.get_parameter(f"{name}.weight").requires_grad_(True)
    loss_of(student.model(token_ids(0)).logits, 0).backward()
    assert all(master.grad is None for master in shadow.parameters())
    assert all(student.model.get_parameter(f"{name}.weight").grad is not None for name in student.weights)
