"""Shadow weights: full-precision masters beside a student whose weights are always the dequantized codes.

The student is a plain model that holds Q(W). Backward gives dL/dQ(W) on its parameters; a hook adds it to the master's
gradient and frees it. After the optimizer step Q(W) is written back once. The gradient passes the rounding unchanged
(straight-through estimator, Bengio et al. 2013) and is zero where the code is clamped (Jacob et al. 2018, section 3).
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kdctl.quant.affine import QuantizedWeight, fake_quantize, inside, into_cell, quantize


class ShadowWeights:
    """Masters of a student's quantized weights.

    Scales and zero points stay those of the quantized weights. Each master starts as the teacher's weight moved into
    the rounding cell of its stored code, so before the first step the student is exactly the quantized one.
    """

    def __init__(self, student: nn.Module, weights: Mapping[str, QuantizedWeight], teacher: nn.Module):
        self._grids = dict(weights)
        self._parameters = {name: student.get_parameter(f"{name}.weight") for name in weights}
        self.masters: dict[str, nn.Parameter] = {}
        for name, weight in weights.items():
            start = into_cell(teacher.get_parameter(f"{name}.weight").detach(), weight)
            self.masters[name] = nn.Parameter(start)
            self._grids[name] = QuantizedWeight(weight.codes.new_empty(0), weight.qparams, weight.grid)
        student.requires_grad_(False)
        self._hooks = [self._follow(name) for name in weights]

    def _follow(self, name: str) -> torch.utils.hooks.RemovableHandle:
        """Send the gradient of one student weight to its master as soon as backward has it."""
        parameter, master = self._parameters[name], self.masters[name]

        def move(_: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad.add_(gradient)

        parameter.requires_grad_(True)
        return parameter.register_post_accumulate_grad_hook(move)

    def parameters(self) -> list[nn.Parameter]:
        """List the masters, which are what an optimizer moves."""
        return list(self.masters.values())

    @torch.no_grad()
    def mask_clamped(self) -> None:
        """Zero the gradients of weights whose code is clamped; call once, before clipping."""
        for name, master in self.masters.items():
            if master.grad is not None:
                grid = self._grids[name]
                master.grad.mul_(inside(master, grid.qparams, grid.grid))

    @torch.no_grad()
    def write_back(self) -> None:
        """Write Q(master) into the student."""
        for name, master in self.masters.items():
            grid = self._grids[name]
            self._parameters[name].copy_(fake_quantize(master, grid.qparams, grid.grid))

    @torch.no_grad()
    def quantized(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Yield each layer's name and its weight on the grid, codes taken from the master."""
        for name, master in self.masters.items():
            grid = self._grids[name]
            yield name, QuantizedWeight(quantize(master, grid.qparams, grid.grid), grid.qparams, grid.grid)

    def detach(self) -> None:
        """Remove the hooks and freeze the student again."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
