"""Divergences between teacher and student over the full vocabulary, in chunks, from final hidden states.

With p the teacher's and q the student's distribution, at softmax temperature T::

    β = 0        forward KL   KL(p‖q) = Σ p·(log p − log q)
    β = 1        reverse KL   KL(q‖p) = Σ q·(log q − log p)
    0 < β < 1    generalized JSD   β·KL(p‖m) + (1 − β)·KL(q‖m),  m = β·p + (1 − β)·q    (Agarwal et al. 2024, eq. 1)

The generalized JSD vanishes as β → 0 or 1; the ``normalized`` scale divides it by β(1 − β), which tends to the two KLs.
``gkd`` leaves it as published (the ends are still the KLs). Logits exist for one chunk of positions at a time: the
output head is frozen, so the gradient with respect to the hidden states is formed in the same pass.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdctl.model.head import Head, rows_at_once
from kdctl.system.fused import fused

Scale = Literal["normalized", "gkd"]


@dataclass(frozen=True)
class Objective:
    """Which divergence is minimised."""

    beta: float = 0.0
    temperature: float = 1.0
    scale: Scale = "normalized"

    @property
    def name(self) -> str:
        """Metric name of the divergence."""
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, "jsd")


def divergence(
    student: Tensor,
    teacher: Tensor,
    head: Head,
    objective: Objective,
    chunk: int = 256,
    each: Tensor | None = None,
) -> Tensor:
    """Sum the divergence over positions; divide by the global token count yourself.

    student, teacher: (N, H) final hidden states of the positions that predict a completion token; each: (N,) float32,
    filled with the divergence of each. Returns a scalar, float32, differentiable with respect to ``student`` only.
    """
    total: Tensor = _Divergence.apply(student, teacher, head, objective, chunk, each)  # pyright: ignore[reportAssignmentType]
    return total


class _Divergence(torch.autograd.Function):
    """Value and gradient in one pass over chunks."""

    @staticmethod
    def forward(
        ctx, student: Tensor, teacher: Tensor, head: Head, objective: Objective, chunk: int, each: Tensor | None
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student)
        rows, work = rows_at_once(student, chunk), fused(value_and_gradient, student)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            logits, wanted = head(student[part]), head(teacher[part])
            for row in range(0, len(logits), rows):
                few = slice(row, row + rows)
                value, logit_gradient = work(logits[few].float(), wanted[few].float(), objective)
                total += value.sum()
                if each is not None:
                    each[start + row : start + row + len(value)] = value
                logits[few] = logit_gradient  # the logits are no longer needed; their place takes the gradient
            gradient[part] = logits @ head.weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None, None


def value_and_gradient(student: Tensor, teacher: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the divergence of each position (N,) and its gradient with respect to the student's logits (N, V)."""
    inverse = 1.0 / objective.temperature
    log_q = torch.log_softmax(student * inverse, -1)
    log_p = torch.log_softmax(teacher * inverse, -1)
    if objective.beta == 0:
        value, gradient = _forward_kl(log_p, log_q)
    elif objective.beta == 1:
        value, gradient = _reverse_kl(log_p, log_q)
    else:
        value, gradient = _jsd(log_p, log_q, objective.beta)
        if objective.scale == "normalized":
            factor = 1.0 / (objective.beta * (1.0 - objective.beta))
            value, gradient = value * factor, gradient * factor
    return value, gradient * inverse


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp() - p


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q, difference = log_q.exp(), log_q - log_p
    value = (q * difference).sum(-1)
    return value, q * (difference - value.unsqueeze(-1))


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Generalized JSD; the logit gradient is (1 − β)·q·(log(q/m) − KL(q‖m))."""
    p, q, delta = log_p.exp(), log_q.exp(), log_p - log_q
    if beta <= 0.5:  # the ratio of m to the distribution it is near is the one to compute: the other would lose it
        m_over_q = _log_mixture_ratio(delta, beta)
        m_over_p = m_over_q - delta
    else:
        m_over_p = _log_mixture_ratio(-delta, 1 - beta)
        m_over_q = m_over_p + delta
    kl_p = -(p * m_over_p).sum(-1)
    kl_q = -(q * m_over_q).sum(-1)
    gradient = q * (-m_over_q - kl_q.unsqueeze(-1)) * (1 - beta)
    return beta * kl_p + (1 - beta) * kl_q, gradient


def _log_mixture_ratio(delta: Tensor, beta: float) -> Tensor:
    """Return log(m/q) = log(1 + β(e^δ − 1)) for δ = log(p/q), accurate for small β and for large |δ|."""
    near = torch.log1p(beta * torch.expm1(delta.clamp(max=20.0)))
    far = delta + torch.log(beta + (1 - beta) * torch.exp(-delta.clamp(min=20.0)))
    return torch.where(delta > 20.0, far, near)
