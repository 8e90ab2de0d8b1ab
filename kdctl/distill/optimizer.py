"""The optimizer step: gradients as they came from backward, float32 ones a few at a time.

What lives as long as training does, masters and AdamW's moments, lies in one block each: between activations that come
and go it would leave holes that nothing fits into.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdctl.config.preset import DistillSection
from kdctl.distill.shadow import Shadow
from kdctl.system.memory import give_back

TOGETHER = 8
"""Tensors whose float32 gradients are made at once where backward left them in another dtype."""
Pending = tuple[nn.Parameter, Tensor]
"""A parameter and its gradient."""


def make_optimizer(shadow: Shadow, settings: DistillSection) -> torch.optim.Optimizer:
    """Build the optimizer that ``distill.optimizer`` names over what a shadow trains.

    AdamW: Loshchilov & Hutter 2019, algorithm 2. Adafactor: Shazeer & Stern 2018, algorithm 4, as torch has it.
    """
    _lay_out(shadow.parameters())
    groups = parameter_groups(shadow, settings)
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    _start_moments(optimizer, shadow.parameters())
    return optimizer


def parameter_groups(shadow: Shadow, settings: DistillSection) -> list[dict[str, Any]]:
    """Split what is trained by learning rate: scales and norms learn in relative steps and are never decayed."""
    kinds: dict[str, list[nn.Parameter]] = {"log_scale": [], "log_gain": [], "": []}
    for name, tensor in shadow.trained.items():
        kind = name.rpartition(".")[2]
        kinds[kind if kind in kinds else ""].append(tensor)
    groups = [
        {"params": kinds[""], "ratio": 1.0},
        {"params": kinds["log_scale"], "ratio": settings.scale_lr_ratio, "weight_decay": 0.0},
        {"params": kinds["log_gain"], "ratio": settings.norm_lr_ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of all gradients together, float32 whatever their dtype, where they lie."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    factor: Tensor | float = 1.0,
    finite: Tensor | None = None,
) -> None:
    """Do an optimizer step with all gradients times ``factor`` and free them.

    finite: a bool on the device; where it is false nothing changes. The host does not wait for it: AdamW reads it
    itself. Adafactor cannot, so for it the host does.
    """
    pending = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    optimizer.zero_grad(set_to_none=True)
    if finite is not None and isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]  # as torch's GradScaler
    elif finite is not None and not finite:
        return
    for part in _parts(pending):
        gradients = [gradient.float() for _, gradient in part]
        torch._foreach_mul_(gradients, torch.as_tensor(factor))
        for (parameter, _), gradient in zip(part, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _parts(pending: Sequence[Pending]) -> Iterator[Sequence[Pending]]:
    """Group parameters by what is updated in one call: all whose gradients are float32, a few of the others."""
    exact = [pair for pair in pending if pair[1].dtype == torch.float32]
    rest = [pair for pair in pending if pair[1].dtype != torch.float32]
    yield from ([exact] if exact else [])
    yield from (rest[start : start + TOGETHER] for start in range(0, len(rest), TOGETHER))


def _lay_out(parameters: Sequence[nn.Parameter]) -> None:
    """Move tensors into one block, and give back where they were before anything else is made."""
    for parameter, place in zip(parameters, _block(parameters), strict=True):
        place.copy_(parameter.data)
        parameter.data = place
    give_back()


def _start_moments(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Give AdamW the state that it would make in its first step."""
    first, second = _block(parameters), _block(parameters)
    for parameter, exp_avg, exp_avg_sq in zip(parameters, first, second, strict=True):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _block(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Make zeros shaped like tensors, float32, one after the other in memory."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    parts = flat.split([p.numel() for p in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
