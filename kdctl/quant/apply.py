"""Walks a model: which layers are quantized, by which method, and the student that results."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from kdctl.base.errors import ModelError, PresetError
from kdctl.config.preset import QuantizeSection
from kdctl.model.load import from_tensors, linear_shapes
from kdctl.quant.affine import QuantizedWeight, Weights, dequantize
from kdctl.quant.methods import QUANTIZERS
from kdctl.quant.quantizer import QuantizeContext
from kdctl.quant.scales import QParamsOf, quantize_weight
from kdctl.run.records import LayerError

GROUP_SIZES = (128, 64, 32, 16, 8)


def select_layers(model: nn.Module, settings: QuantizeSection) -> list[str]:
    """List the linear layers to quantize. Works on a model without weights.

    Raises PresetError if a skip pattern matches nothing or the group size does not divide in_features, ModelError if
    nothing is left to quantize.
    """
    shapes = linear_shapes(model)
    for pattern in settings.skip:
        if not any(fnmatchcase(name, pattern) for name in shapes) and pattern != "lm_head":
            raise PresetError(
                f"quantize.skip pattern {pattern!r} matches no linear layer; layers look like "
                f"{next(iter(shapes), 'none')!r}"
            )
    names = [name for name in shapes if not any(fnmatchcase(name, pattern) for pattern in settings.skip)]
    if not names:
        raise ModelError("no linear layer is left to quantize; the model has none, or quantize.skip names them all")
    for name in names:
        _check_group_size(name, shapes[name][1], settings.group_size)
    return names


def _check_group_size(name: str, in_features: int, group_size: int) -> None:
    if in_features % group_size:
        fitting = ", ".join(str(size) for size in GROUP_SIZES if in_features % size == 0)
        raise PresetError(
            f"quantize.group_size={group_size} does not divide in_features={in_features} of {name}, so its last group "
            f"would have no whole scale; use {fitting or 'another size'}, or add the layer to quantize.skip"
        )


def quantize_layers(teacher: PreTrainedModel, names: Sequence[str], settings: QuantizeSection) -> Weights:
    """Quantize each named layer's weight with a method that needs no calibration."""
    return QUANTIZERS[settings.method].quantize(QuantizeContext(teacher, names, settings))


def quantize_each(context: QuantizeContext, qparams_of: QParamsOf) -> Weights:
    """Quantize each layer's weight by itself; scales take its dtype."""
    weights: Weights = {}
    with context.task() as advance:
        for done, name in enumerate(context.layers):
            weight = context.teacher.get_parameter(f"{name}.weight").detach()
            weights[name] = quantize_weight(weight, qparams_of, context.grid, weight.dtype)
            advance(done + 1, len(context.layers))
    return weights


def build_student(teacher: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> PreTrainedModel:
    """Build the student: Q(W) in the quantized layers, all other tensors shared with the teacher."""
    return share_frozen(student_of(Parts.of(teacher), weights), teacher, weights)


@dataclass(frozen=True)
class Parts:
    """What a model is made of, without the model, which may be forgotten meanwhile."""

    config: PretrainedConfig
    generation: GenerationConfig
    tensors: dict[str, Tensor]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Parts":
        """Take a model apart; its tensors are not copied."""
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        return cls(model.config, model.generation_config, tensors, model.dtype, model.device)


def student_of(parts: Parts, weights: Mapping[str, QuantizedWeight]) -> PreTrainedModel:
    """Put Q(W) in the place of a teacher's weights, each of which is freed if nobody else has it, and build a model."""
    for name, weight in weights.items():
        parts.tensors[f"{name}.weight"] = dense(weight)
    student = from_tensors(parts.config, parts.tensors, parts.dtype)
    student.generation_config = parts.generation
    return student.to(parts.device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]


def share_frozen(
    student: PreTrainedModel, teacher: PreTrainedModel, weights: Mapping[str, QuantizedWeight]
) -> PreTrainedModel:
    """Make every parameter outside the quantized layers one object in both models, frozen."""
    student.requires_grad_(False)
    quantized = {f"{name}.weight" for name in weights}
    for name, parameter in teacher.named_parameters(remove_duplicate=False):
        if name not in quantized:
            owner, _, leaf = name.rpartition(".")
            student.get_submodule(owner).register_parameter(leaf, parameter)
    return student


def dense(weight: QuantizedWeight) -> Tensor:
    """Return Q(W)."""
    return dequantize(weight.codes, weight.qparams, weight.grid)


def layer_errors(original: Callable[[str], Tensor], weights: Mapping[str, QuantizedWeight]) -> tuple[LayerError, ...]:
    """Measure ‖W − Q(W)‖/‖W‖ of each layer, worst first. original: returns the teacher's parameter of a name."""
    found = [_layer_error(name, original(f"{name}.weight"), weight) for name, weight in weights.items()]
    return tuple(sorted(found, key=lambda error: -(error.relative_error or 0.0)))


def sqnr(original: Callable[[str], Tensor], weights: Mapping[str, QuantizedWeight]) -> float:
    """Return 10·log10(Σ‖W‖² / Σ‖W − Q(W)‖²) over all quantized layers, in dB; ∞ where nothing was lost.

    original: returns the teacher's parameter of a name.
    """
    norms = [_norms(original(f"{name}.weight"), weight) for name, weight in weights.items()]
    signal, noise = (sum(norm**2 for norm in column) for column in zip(*norms, strict=True))
    return 10 * math.log10(max(signal, 1e-300) / noise) if noise else math.inf


def _norms(weight: Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """Return ‖W‖ and ‖W − Q(W)‖ of one layer, in float64."""
    original = weight.detach().to(quantized.codes.device).double()
    noise = torch.linalg.vector_norm(original - dense(quantized).double())
    return float(torch.linalg.vector_norm(original)), float(noise)


def _layer_error(name: str, weight: Tensor, quantized: QuantizedWeight) -> LayerError:
    signal, noise = _norms(weight, quantized)
    if signal == 0:
        return LayerError(name=name, relative_error=None, sqnr_db=None)
    relative = noise / max(signal, 1e-30)
    decibels = -20 * float(torch.tensor(max(relative, 1e-30), dtype=torch.float64).log10())
    return LayerError(name=name, relative_error=relative, sqnr_db=decibels)
