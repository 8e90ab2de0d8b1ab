"""Shadow weights: what training moves, beside a student whose weights are always the dequantized codes.

The student is a plain model that holds Q(W). Backward gives G = dL/dQ(W) on its parameters; a hook hands G to the
receiver as it appears and frees it. After the optimizer step Q(W) is written back once. Three receivers:

    weights   W ← G (straight-through estimator, Bengio et al. 2013; zero where the code is clamped, Jacob et al. 2018)
    lora      A, B ← G through W + (α/r)·B·A, always inside Q (Hu et al. 2021, eq. 3)
    scales    codes frozen, s ← Σ over the group of G·(q − z)

With ``weights`` the scales may be learned beside W (Esser et al. 2020, eq. 3). Learned scales are s₀·exp(t), t in
float32: always positive, zero steps leave s₀ to the bit, and one learning rate means the same relative step everywhere.
With any of them norms may be learned in the same way: what a norm multiplies a channel by becomes exp(t) times it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from kdctl.base.errors import PresetError
from kdctl.base.rng import digest
from kdctl.config.preset import DistillSection
from kdctl.distill.fsdp import gathered_like, local, rows_like, summed_like
from kdctl.quant.affine import (
    Grid,
    QParams,
    QuantizedWeight,
    grid_position,
    grouped,
    inside,
    into_cell,
    quantize,
    round_scale,
    unclamped,
    write_dequantized,
    write_quantized,
)
from kdctl.system.fused import fused

Weights = Mapping[str, QuantizedWeight]


class Shadow(ABC):
    """Hooks between a student's quantized weights and the tensors that an optimizer moves.

    trained: those tensors by name, float32. The student holds Q of them after ``write_back`` and at the start, where it
    is exactly the quantized model that was given. Where FSDP2 divides the student, ``weights`` are this process's rows,
    and so is every tensor that is trained. last_pass: the next backward is the last before ``write_back``, so
    where backward has finished with a weight its gradient may take its place.
    """

    last_pass = False

    def __init__(self, student: nn.Module, weights: Weights, train_norms: bool = False):
        self.trained: dict[str, nn.Parameter] = {}
        self._grids = {
            name: replace(weight, codes=weight.codes.new_empty(0), offsets=None) for name, weight in weights.items()
        }
        self._parameters = {name: student.get_parameter(f"{name}.weight") for name in weights}
        student.requires_grad_(False)
        self._hooks = [self._follow(self._parameters[name], name, self.receive) for name in weights]
        self._norms: dict[str, Norm] = {}
        if train_norms:
            for name in [n for n, p in student.named_parameters() if p.dim() == 1 and "norm" in n]:
                self._learn_norm(student, name)

    @staticmethod
    def _follow(
        parameter: nn.Parameter, name: str, receive: Callable[[str, Tensor], None]
    ) -> torch.utils.hooks.RemovableHandle:
        """Hand the gradient of one student parameter on as soon as backward has it, and free it."""

        def move(_: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                with torch.no_grad():
                    receive(name, local(gradient))

        parameter.requires_grad_(True)
        return parameter.register_post_accumulate_grad_hook(move)

    @abstractmethod
    def receive(self, name: str, gradient: Tensor) -> None:
        """Add one layer's dL/dQ(W), (out_features, in_features), to the gradients of what is trained."""

    @abstractmethod
    def quantized_layer(self, name: str) -> QuantizedWeight:
        """Return a layer on the grid, codes taken from masters or storage, never from Q(W)."""

    @abstractmethod
    def write(self, name: str, place: Tensor) -> None:
        """Write a layer's Q(W) where it is to be."""

    @torch.no_grad()
    def write_back(self) -> None:
        """Write Q(W), and norms as trained so far, into the student."""
        for name, parameter in self._parameters.items():
            self.write(name, local(parameter).detach())
        for name, norm in self._norms.items():
            log_gain = gathered_like(self._divided, self.trained[f"{name}.log_gain"].detach(), len(norm.start))
            norm.own.copy_(norm.start + (norm.start + norm.added) * log_gain.expm1())

    @torch.no_grad()
    def quantized(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Yield each layer's name and its weight on the grid."""
        for name in self._parameters:
            yield name, self.quantized_layer(name)

    def parameters(self) -> list[nn.Parameter]:
        """List what an optimizer moves."""
        return list(self.trained.values())

    def detach(self) -> None:
        """Remove the hooks and freeze the student again."""
        for hook in self._hooks:
            hook.remove()
        for parameter in (*self._parameters.values(), *(norm.own for norm in self._norms.values())):
            parameter.requires_grad_(False)

    def _learn_norm(self, student: nn.Module, name: str) -> None:
        """Give the student a norm of its own, apart from the teacher's, and train it."""
        owner, _, leaf = name.rpartition(".")
        module, own = student.get_submodule(owner), nn.Parameter(student.get_parameter(name).detach().clone())
        module.register_parameter(leaf, own)
        start = own.detach().to(torch.float32, copy=True)
        self._norms[name] = Norm(own, start, _added(module, own) if leaf == "weight" else 0.0)
        self.trained[f"{name}.log_gain"] = nn.Parameter(rows_like(self._divided, torch.zeros_like(own).float()))
        self._hooks.append(self._follow(own, name, self._receive_norm))

    def _receive_norm(self, name: str, gradient: Tensor) -> None:
        """Add dL/dw to the gradient of t in w + a = (w₀ + a)·exp(t): dL/dt = (w + a)·dL/dw."""
        norm = self._norms[name]
        slope = gradient.float() * (norm.own.detach().float() + norm.added)
        _accumulate(self.trained[f"{name}.log_gain"], summed_like(self._divided, slope))

    @property
    def _divided(self) -> Tensor:
        """A parameter that is divided where any is."""
        return next(iter(self._parameters.values()))

    def _learn_scale(self, name: str) -> None:
        """Make a layer's scales trainable."""
        scale = self._grids[name].qparams.scale
        self.trained[f"{name}.log_scale"] = nn.Parameter(torch.zeros_like(scale, dtype=torch.float32))

    def qparams(self, name: str) -> QParams:
        """Return a layer's scales, as trained so far and rounded to their stored dtype, and its zero points."""
        start = self._grids[name].qparams
        log_scale = self.trained.get(f"{name}.log_scale")
        if log_scale is None:
            return start
        return QParams(round_scale(start.scale.float() * log_scale.exp(), start.scale.dtype), start.zero_point)

    def _receive_scale(self, name: str, scale_gradient: Tensor) -> None:
        """Add dL/ds, (out_features, groups), to the gradient of t in s = s₀·exp(t): dL/dt = s·dL/ds."""
        _accumulate(self.trained[f"{name}.log_scale"], scale_gradient * self.qparams(name).scale.float())


@dataclass(frozen=True)
class Norm:
    """A norm that is trained. own: the student's parameter; start: what it was, float32; added: 1 where it adds one."""

    own: nn.Parameter
    start: Tensor
    added: float


@torch.no_grad()
def _added(norm: nn.Module, weight: Tensor) -> float:
    """Return what a norm adds to its weight before it multiplies by it: 1 in the Gemma family, else 0."""
    signs = torch.ones_like(weight)
    signs[::2] = -1
    gain = (norm(signs) - norm(-signs)) / 2 * signs  # without a bias; signs have the mean 0 and the variance 1
    return float((gain.float() - weight.float()).mean().round())


class ShadowWeights(Shadow):
    """Full-precision masters, one a weight; each starts in the rounding cell of its stored code."""

    def __init__(
        self,
        student: nn.Module,
        weights: Weights,
        teacher: nn.Module,
        learn_scales: bool = False,
        train_norms: bool = False,
    ):
        super().__init__(student, weights, train_norms)
        for name, weight in weights.items():
            start = into_cell(local(teacher.get_parameter(f"{name}.weight")).detach(), weight)
            self.trained[f"{name}.master"] = nn.Parameter(start)
            if learn_scales:
                self._learn_scale(name)

    @property
    def masters(self) -> dict[str, nn.Parameter]:
        """Map each layer to its master."""
        return {name: self.trained[f"{name}.master"] for name in self._parameters}

    def receive(self, name: str, gradient: Tensor) -> None:
        """Pass G to the master where its code is not clamped, and Σ G·∂Q/∂s to the scale."""
        learned = f"{name}.log_scale" in self.trained
        given = gradient, self.trained[f"{name}.master"].detach(), self.qparams(name), self._grids[name].grid
        slope = fused(pass_through, gradient)(*given, learned)
        if slope is not None:
            self._receive_scale(name, slope)
        if self.last_pass:
            gradient = local(self._parameters[name]).detach().copy_(gradient)
        _accumulate(self.trained[f"{name}.master"], gradient)

    def quantized_layer(self, name: str) -> QuantizedWeight:
        """Return a layer on the grid, codes taken from the master."""
        qparams, grid = self.qparams(name), self._grids[name].grid
        return QuantizedWeight(quantize(self.trained[f"{name}.master"], qparams, grid), qparams, grid)

    def write(self, name: str, place: Tensor) -> None:
        """Write a layer's Q(W) without forming codes."""
        master = self.trained[f"{name}.master"].detach()
        fused(write_quantized, place)(place, master, self.qparams(name), self._grids[name].grid)


class ShadowLora(Shadow):
    """Low-rank updates inside Q: the layer is Q(W + (α/r)·B·A), W frozen and, where its code allows, the teacher's own.

    Layers that match no target keep their codes. A is divided by rows like the rest, and gathered where it is read.
    Raises PresetError if a target matches nothing.
    """

    def __init__(self, student: nn.Module, weights: Weights, teacher: nn.Module, settings: DistillSection):
        targets = {name: w for name, w in weights.items() if any(fnmatchcase(name, t) for t in settings.lora_targets)}
        for target in settings.lora_targets:
            if not any(fnmatchcase(name, target) for name in weights):
                raise PresetError(
                    f"distill.lora_targets pattern {target!r} matches no quantized layer; "
                    f"layers look like {next(iter(weights))!r}"
                )
        super().__init__(student, targets, settings.train_norms)
        self._untouched = {
            name: replace(weight, offsets=None) for name, weight in weights.items() if name not in targets
        }
        self._rank = settings.lora_rank
        self._factor = settings.effective_lora_alpha / settings.lora_rank
        self._frozen: dict[str, Tensor] = {}
        for name, weight in targets.items():
            self._frozen[name] = _frozen_base(local(teacher.get_parameter(f"{name}.weight")).detach(), weight)
            self._add_adapter(name, weight, settings)

    def _add_adapter(self, name: str, weight: QuantizedWeight, settings: DistillSection) -> None:
        """Start with A uniform in ±1/√in_features, keyed by seed and layer, and B zero."""
        rows, columns = weight.codes.shape
        generator = torch.Generator().manual_seed(digest("lora", settings.seed, name) >> 1)
        start = torch.rand(settings.lora_rank, columns, generator=generator).mul_(2).sub_(1).div_(columns**0.5)
        device = weight.codes.device
        self.trained[f"{name}.lora_a"] = nn.Parameter(rows_like(self._parameters[name], start.to(device)))
        self.trained[f"{name}.lora_b"] = nn.Parameter(torch.zeros(rows, settings.lora_rank, device=device))

    def master(self, name: str) -> Tensor:
        """Return W + (α/r)·B·A, float32."""
        return torch.addmm(self._frozen[name].float(), self._b(name), self._a(name), alpha=self._factor)

    def _a(self, name: str) -> Tensor:
        rows = self.trained[f"{name}.lora_a"].detach()
        return gathered_like(self._parameters[name], rows, self._rank)

    def _b(self, name: str) -> Tensor:
        return self.trained[f"{name}.lora_b"].detach()

    def receive(self, name: str, gradient: Tensor) -> None:
        """Pass G, zero where the code is clamped, through the product: dL/dA = (α/r)·Bᵀ·G, dL/dB = (α/r)·G·Aᵀ."""
        grid, a, b = self._grids[name], self._a(name), self._b(name)
        master = torch.addmm(self._frozen[name].float(), b, a, alpha=self._factor)
        inner = fused(scaled_inside, gradient)(gradient, master, grid.qparams, grid.grid, self._factor)
        _accumulate(self.trained[f"{name}.lora_a"], summed_like(self._parameters[name], b.T @ inner, copies=False))
        _accumulate(self.trained[f"{name}.lora_b"], inner @ a.T)

    def quantized_layer(self, name: str) -> QuantizedWeight:
        """Return a layer on the grid, adapter included."""
        grid = self._grids[name]
        return QuantizedWeight(quantize(self.master(name), grid.qparams, grid.grid), grid.qparams, grid.grid)

    def write(self, name: str, place: Tensor) -> None:
        """Write a layer's Q(W + (α/r)·B·A) without forming codes."""
        grid = self._grids[name]
        fused(write_quantized, place)(place, self.master(name), grid.qparams, grid.grid)

    def quantized(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Yield each layer on the grid, those without an adapter as they were."""
        yield from super().quantized()
        yield from self._untouched.items()


class ShadowScales(Shadow):
    """Scales alone, codes as stored."""

    def __init__(self, student: nn.Module, weights: Weights, train_norms: bool = False):
        super().__init__(student, weights, train_norms)
        self._codes = {name: weight.codes for name, weight in weights.items()}
        for name in weights:
            self._learn_scale(name)

    def receive(self, name: str, gradient: Tensor) -> None:
        """Pass Σ over the group of G·(q − z) to the scale."""
        grid = self._grids[name]
        slope = fused(code_slope, gradient)(gradient, self._codes[name], grid.qparams.zero_point, grid.grid)
        self._receive_scale(name, slope)

    def write(self, name: str, place: Tensor) -> None:
        """Write a layer's Q(W) of its stored codes."""
        fused(write_dequantized, place)(place, self._codes[name], self.qparams(name), self._grids[name].grid)

    def quantized_layer(self, name: str) -> QuantizedWeight:
        """Return a layer with its stored codes and its scales as trained."""
        return QuantizedWeight(self._codes[name], self.qparams(name), self._grids[name].grid)


def pass_through(gradient: Tensor, weight: Tensor, qparams: QParams, grid: Grid, scales: bool) -> Tensor | None:
    """Clear G where a weight's code is clamped, in place; with ``scales`` return Σ G·∂Q/∂s, (out_features, groups)."""
    position = grid_position(weight, qparams, grid)
    free, slope = unclamped(position, grid), None
    if scales:
        zero = qparams.zero_point.unsqueeze(-1)
        moved = position.round().clamp_(0, grid.max_code) - zero - torch.where(free, position - zero, 0.0)
        slope = (grouped(gradient, grid.group_size) * moved).sum(-1)
    gradient.mul_(free.flatten(-2))
    return slope


def scaled_inside(gradient: Tensor, weight: Tensor, qparams: QParams, grid: Grid, factor: float) -> Tensor:
    """Return G times a factor, float32, zero where a weight's code is clamped."""
    return gradient.float().mul_(inside(weight, qparams, grid)).mul_(factor)


def code_slope(gradient: Tensor, codes: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Return Σ over each group of G·(q − z), (out_features, groups) float32."""
    slope = grouped(codes, grid.group_size).float() - zero_point.unsqueeze(-1)
    return (grouped(gradient.float(), grid.group_size) * slope).sum(-1)


def make_shadow(settings: DistillSection, student: nn.Module, weights: Weights, teacher: nn.Module) -> Shadow:
    """Build the receiver that ``distill.train`` names."""
    if settings.train == "lora":
        return ShadowLora(student, weights, teacher, settings)
    if settings.train == "scales":
        return ShadowScales(student, weights, settings.train_norms)
    return ShadowWeights(student, weights, teacher, settings.learn_scales, settings.train_norms)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Take a gradient as it is where there is none yet, else add to it in float32."""
    parameter.grad_dtype = None  # pyright: ignore[reportAttributeAccessIssue]  # any: a lone bfloat16 one stays so
    parameter.grad = gradient if parameter.grad is None else parameter.grad.float().add_(gradient)


def _frozen_base(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return the teacher's own tensor where it rounds to the stored codes, else a copy with the others at Q(W).

    Q(W) is the middle of a code's cell and of the weight's dtype, so the copy loses nothing of ``into_cell``.
    """
    base = into_cell(weight, replace(quantized, offsets=None)).to(weight.dtype)
    return weight if torch.equal(base, weight) else base
