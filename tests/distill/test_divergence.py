"""Divergences against float64 over full logits: value, gradient, chunks, ends of β, extreme logits."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kdctl.distill.divergence import Objective, Scale, divergence, value_and_gradient
from kdctl.model.head import Head, token_chunk
from kdctl.system.fused import compiled

BETAS = (0.0, 1e-4, 0.01, 0.1, 0.5, 0.9, 0.999, 1.0)
HIDDEN, VOCABULARY = 12, 101
SCALES: tuple[Scale, ...] = ("normalized", "gkd")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def setup(rows: int, difference: float = 0.5) -> tuple[Tensor, Tensor, Head]:
    """Return student and teacher hidden states and a head with a bias, float32; logits are a few units wide."""
    teacher = random(rows, HIDDEN)
    student = teacher + difference * random(rows, HIDDEN, seed=1)
    return student.requires_grad_(), teacher, Head(0.6 * random(VOCABULARY, HIDDEN, seed=2), random(VOCABULARY, seed=3))


def reference(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """Compute the divergence of each position from float64 logits, as the definition has it."""
    beta = objective.beta
    log_q = torch.log_softmax(student / objective.temperature, -1)
    log_p = torch.log_softmax(teacher / objective.temperature, -1)
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    first = (log_p.exp() * (log_p - log_m)).sum(-1)
    second = (log_q.exp() * (log_q - log_m)).sum(-1)
    value = beta * first + (1 - beta) * second
    return value / (beta * (1 - beta)) if objective.scale == "normalized" else value


def reference_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden.double() @ head.weight.double().t()
    return logits if head.bias is None else logits + head.bias.double()


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors in the Euclidean norm."""
    return float(torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradient_are_those_of_float64_autograd(beta: float, temperature: float, scale: Scale):
    student, teacher, head = setup(23)
    objective = Objective(beta, temperature, scale)
    value = divergence(student, teacher, head, objective, chunk=8)
    value.backward()

    exact = student.detach().double().requires_grad_()
    expected = reference(reference_logits(exact, head), reference_logits(teacher, head), objective).sum()
    (gradient,) = torch.autograd.grad(expected, exact)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert student.grad is not None
    assert distance(student.grad, gradient) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 5, 16, 17])
def test_chunks_do_not_change_the_sum_or_the_gradient(rows: int, beta: float):
    found = []
    for chunk in (1, 4, 16, 256):
        student, teacher, head = setup(rows)
        value = divergence(student, teacher, head, Objective(beta), chunk)
        value.backward()
        assert student.grad is not None
        found.append((value.detach(), student.grad))
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)


def test_sum_over_positions_is_the_sum_of_single_positions():
    student, teacher, head = setup(9)
    whole = divergence(student, teacher, head, Objective(0.2))
    single = sum(divergence(student[i : i + 1], teacher[i : i + 1], head, Objective(0.2)) for i in range(9))
    torch.testing.assert_close(whole, single)


def test_no_positions_sum_to_zero():
    student, teacher, head = setup(0)
    value = divergence(student, teacher, head, Objective())
    value.backward()
    assert float(value.detach()) == 0
    assert student.grad is not None
    assert student.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("beta", BETAS)
def test_identical_inputs_have_zero_loss_and_zero_gradient(beta: float, scale: Scale):
    student, _, head = setup(7)
    value = divergence(student, student.detach().clone(), head, Objective(beta, 1.0, scale), chunk=4)
    value.backward()
    assert student.grad is not None
    assert float(value.detach()) == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_is_positive_wherever_the_distributions_differ(beta: float):
    student, teacher = random(500, 50, seed=1), random(500, 50)
    value, gradient = value_and_gradient(student, teacher, Objective(beta))
    assert (value > 0).all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(500), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("beta", BETAS)
def test_swapping_the_two_models_mirrors_beta(beta: float, scale: Scale):
    student, teacher = 2 * random(20, 50, seed=1), 2 * random(20, 50)
    value, _ = value_and_gradient(student, teacher, Objective(beta, 1.0, scale))
    mirrored, _ = value_and_gradient(teacher, student, Objective(1 - beta, 1.0, scale))
    torch.testing.assert_close(value, mirrored, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("near", "end"), [(1e-4, 0.0), (1 - 1e-4, 1.0), (1e-6, 0.0), (1 - 1e-6, 1.0)])
def test_normalized_divergence_tends_to_the_kls_and_gkds_vanishes(near: float, end: float):
    student, teacher = random(20, 50, seed=1), random(20, 50)
    kl, kl_gradient = value_and_gradient(student, teacher, Objective(end))
    value, gradient = value_and_gradient(student, teacher, Objective(near))
    torch.testing.assert_close(value, kl, rtol=2e-3, atol=0)
    assert distance(gradient, kl_gradient.double()) < 2e-3

    unscaled, unscaled_gradient = value_and_gradient(student, teacher, Objective(near, 1.0, "gkd"))
    assert (unscaled < 2 * min(near, 1 - near) * kl).all()
    assert torch.linalg.vector_norm(unscaled_gradient) < 2 * min(near, 1 - near) * torch.linalg.vector_norm(kl_gradient)
    end_value, _ = value_and_gradient(student, teacher, Objective(end, 1.0, "gkd"))
    assert torch.equal(end_value, kl)


@pytest.mark.parametrize("beta", [1e-6, *BETAS, 1 - 1e-6])
def test_logits_of_plus_minus_60_keep_their_value_and_gradient(beta: float):
    signs = random(2, 64, 40).sign() * 60
    student, teacher = signs[0] + random(64, 40, seed=1), signs[1] + random(64, 40, seed=2)
    value, gradient = value_and_gradient(student, teacher, Objective(beta))
    exact = student.double().requires_grad_()
    expected = reference(exact, teacher.double(), Objective(beta))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert distance(gradient, expected_gradient) < 1e-4


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("gap", [100.0, 1e4, 1e30])
@pytest.mark.parametrize("beta", [1e-6, *BETAS, 1 - 1e-6])
def test_impossible_tokens_give_finite_values_and_gradients(beta: float, gap: float, scale: Scale):
    student, teacher = random(6, 10), random(6, 10, seed=1)
    student[:4, :3] -= gap
    teacher[2:, 2:5] -= gap
    value, gradient = value_and_gradient(student, teacher, Objective(beta, 1.0, scale))
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert (value > 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_bf16_head_stays_finite_and_close(beta: float):
    student, teacher, head = setup(16)
    half = Head(head.weight.bfloat16())
    low, high = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    value = divergence(low, high, half, Objective(beta), chunk=5)
    value.backward()
    exact = half.logits(low.detach()).double().requires_grad_()
    expected = reference(exact, half.logits(high).double(), Objective(beta)).sum()
    (logit_gradient,) = torch.autograd.grad(expected, exact)
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
    assert torch.isfinite(low.grad).all()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert distance(low.grad, logit_gradient @ half.weight.double()) < 0.02


@pytest.mark.parametrize("factor", [0.25, -3.0, 1 / 700])
def test_gradient_scales_with_the_upstream_gradient(factor: float):
    student, teacher, head = setup(6)
    (plain,) = torch.autograd.grad(divergence(student, teacher, head, Objective(0.5)), student)
    (scaled,) = torch.autograd.grad(divergence(student, teacher, head, Objective(0.5)) * factor, student)
    assert (plain != 0).all()
    torch.testing.assert_close(scaled, plain * factor)


def test_teacher_and_head_get_no_gradient():
    student, teacher, head = setup(6)
    teacher.requires_grad_()
    head.weight.requires_grad_()
    divergence(student, teacher, head, Objective(0.5)).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert head.weight.grad is None


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_host_reads_nothing_so_that_a_gpu_never_waits(beta: float):
    student, teacher, head = setup(600)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hidden, states, weight = (mode.from_tensor(tensor.detach()) for tensor in (student, teacher, head.weight))
        loss = divergence(hidden.requires_grad_(), states, Head(weight), Objective(beta))
        loss.backward()
        assert hidden.grad is not None
        with pytest.raises(DataDependentOutputException):
            loss.detach().item()


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_what_is_fused_for_a_gpu_computes_the_same(beta: float):
    for rows in (7, 12):
        student, teacher = (3 * random(rows, VOCABULARY, seed=seed) for seed in (1, 2))
        expected = value_and_gradient(student, teacher, Objective(beta, 0.7))
        found = compiled(value_and_gradient)(student, teacher, Objective(beta, 0.7))
        for own, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [264, 32_000, 49_152, 151_936, 10_000_000])
def test_chunk_fits_the_budget_but_is_never_below_16(vocabulary: int):
    chunk, budget = token_chunk(vocabulary), 64 * 2**20
    assert chunk >= 16
    assert chunk == 16 or budget / 2 < chunk * vocabulary * 8 <= budget


def test_metric_name_says_which_divergence():
    assert [Objective(beta).name for beta in (0.0, 1e-4, 0.5, 1.0)] == ["forward_kl", "jsd", "jsd", "reverse_kl"]
