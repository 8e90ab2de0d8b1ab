"""Model folders to models, and the kinds of network that kdctl does not handle."""

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationConfigMixin

from kdctl.base.errors import ModelError
from kdctl.model.head import check_head
from kdctl.system.cpu_products import widen_products

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EXPERT_PARTS = {"experts", "router", "expert"}


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model without weights, to look at its layers. Raises ModelError for kinds that kdctl does not handle."""
    if "quantization_config" in config.to_dict():
        raise ModelError(
            f"the teacher is already quantized ({config.to_dict()['quantization_config'].get('quant_method')}); kdctl "
            "needs its full-precision weights"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ModelError(f"model type {config.model_type!r} is not a causal language model here: {error}") from None
    check_architecture(model)
    return model


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


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Map the name of each linear layer but the output head to (out_features, in_features)."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()  # pyright: ignore
    }


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, how: QuantizationConfigMixin | None = None
) -> PreTrainedModel:
    """Load a model for evaluation, quantized weights as ``how`` says.

    Raises ModelError if its logits are more than lm_head(hidden).
    """
    options = {"dtype": dtype, "output_loading_info": True} | ({"quantization_config": how} if how else {})
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, **options)  # pyright: ignore
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model cannot be loaded: {error}") from None
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"])[:3])
        raise ModelError(
            f"{folder}: {len(found['missing_keys'])} tensors are missing ({names}) and would be random numbers; "
            "the files are incomplete, fetch the model again"
        )
    check_head(model)
    return ready(model, device)


def from_tensors(config: PretrainedConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """Build a model from a state dict."""
    kind = type(skeleton(config))
    return kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype)


def ready(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to its device, in evaluation mode and frozen; on a CPU see to its products."""
    if device.type == "cpu":
        widen_products()
    return model.to(device).eval().requires_grad_(False)  # pyright: ignore


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a preset's dtype name."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def pick_device(name: str) -> torch.device:
    """Return the device of a preset's device name. Raises ModelError if CUDA is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("runtime.device=cuda and no CUDA device is visible to torch; use runtime.device=cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def quiet() -> None:
    """Turn off the progress bars and warnings of transformers for this process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
