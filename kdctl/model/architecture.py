"""Kinds of network that kdctl does not handle, recognized before any weight is read."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdctl.base.errors import ModelError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EXPERT_PARTS = {"experts", "router", "expert"}


def check_architecture(model: PreTrainedModel) -> None:
    """Raise ModelError for mixtures of experts and for linear layers that are stored the other way round."""
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            raise ModelError(
                f"model type {model.config.model_type!r} keeps its linear layers as Conv1D with transposed weights "
                f"({name}), which the pack-quantized format does not describe; kdctl quantizes nn.Linear only"
            )
        if EXPERT_PARTS & set(name.split(".")) or _holds_experts(module):
            raise ModelError(
                f"model type {model.config.model_type!r} is a mixture of experts ({name}): a router chooses the "
                "weights that a token meets, and kdctl neither quantizes expert tensors nor keeps its choices; use a "
                "dense model"
            )


def _holds_experts(module: nn.Module) -> bool:
    """Tell whether a module has a weight for several experts in one tensor."""
    own = module.parameters(recurse=False)
    return not isinstance(module, CONVOLUTIONS) and any(parameter.dim() > 2 for parameter in own)
