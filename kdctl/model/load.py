"""Model folders to models."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from kdctl.base.errors import ModelError, brief
from kdctl.model.absent import check_no_adapter
from kdctl.model.architecture import check_architecture
from kdctl.model.configuration import read_config, reason
from kdctl.model.folder import open_tensors, weight_files
from kdctl.model.sound import check_network, check_weights
from kdctl.system.cpu_products import widen_products

EXTRA = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors that older programs stored and that a network makes itself."""


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model without weights, to look at its layers. Raises ModelError for kinds that kdctl does not handle."""
    quantized = config.to_dict().get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ModelError(f"the teacher is already quantized ({method}); kdctl needs its full-precision weights")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - impossible sizes fail in the constructor of any layer, in any way
        raise ModelError(
            f"no causal language model can be built from the configuration of model type {config.model_type!r}: "
            f"{reason(error)}"
        ) from None
    check_architecture(model)
    return model


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
    """Load a model for evaluation, quantized weights as ``how`` says, and check once that kdctl can read it rightly.

    Raises ModelError if tensors are missing, left over or not finite, and if the network gives other numbers for
    sequences laid end to end or continued from a cache than for each alone.
    """
    check_no_adapter(folder)
    model, found = open_weights(AutoModelForCausalLM, folder, read_config(folder), dtype, how)
    check_complete(folder, found)
    check_tied(folder, model)
    if how is None:
        check_stored(folder, model)
    check_weights(model)
    model = ready(model, device)
    check_network(model)
    return model


def open_weights(
    auto: Any, folder: Path, config: PretrainedConfig, dtype: torch.dtype, how: QuantizationConfigMixin | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Let one of transformers' Auto classes load a folder; return what it says was missing or left over, too."""
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are looked at by name
    options |= {"trust_remote_code": False, "use_safetensors": True}
    options |= {"quantization_config": how} if how else {}
    try:
        return auto.from_pretrained(folder, config=config, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except ImportError as error:
        raise ModelError(f"{folder}: its weights need a package that is not here: {brief(error)}") from None
    except Exception as error:  # noqa: BLE001 - files and configuration can disagree in any way
        raise ModelError(f"{folder}: the model cannot be loaded: {reason(error)}") from None


def check_complete(folder: Path, found: Mapping[str, Any]) -> None:
    """Raise ModelError unless the files hold each of the network's tensors and nothing else."""
    missing, extra = (sorted(found[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    extra = [name for name in extra if not EXTRA.search(name)]
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"{folder}: the model cannot be loaded: {name} is {tuple(stored)} in the files and {tuple(wanted)} by "
            "config.json; one of the two is another model's, fetch the model again"
        )
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} tensors are missing ({', '.join(missing[:3])}) and would be random numbers; "
            "the files are incomplete, fetch the model again"
        )
    if extra:
        raise ModelError(
            f"{folder}: {len(extra)} tensors of the files have no place in the network that config.json describes "
            f"({', '.join(extra[:3])}), so what is loaded would not be the model that was saved; correct config.json, "
            "or open the model with transformers and save it again without them"
        )


def check_stored(folder: Path, model: PreTrainedModel) -> None:
    """Raise ModelError if a weight is stored as whole numbers: codes of a quantized model, which need a scale."""
    weights = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for path in weight_files(folder):
        with open_tensors(path) as file:
            for name in weights.intersection(file.keys()):
                kind = file.get_slice(name).get_dtype()
                if not kind.startswith(("F", "BF")):
                    raise ModelError(
                        f"{path}: {name} is stored as {kind}, whole numbers, where the network has a weight: codes of "
                        "a quantized model without the scales that they need; fetch the full-precision model"
                    )


def check_tied(folder: Path, model: PreTrainedModel) -> None:
    """Raise ModelError if the output head is said to be the embeddings and is not."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and isinstance(head, nn.Module) and head.weight is not embeddings.weight:
        raise ModelError(
            f"{folder}: config.json says tie_word_embeddings=true, but the files hold an output head of their own that "
            "differs from the embeddings, and programs disagree on which of the two counts; set tie_word_embeddings to "
            "false in config.json if the head is right, or remove its tensor from the files"
        )


def from_tensors(config: PretrainedConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """Build a model from a state dict."""
    kind = type(skeleton(config))
    return kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype)


def ready(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to its device, in evaluation mode and frozen; on a CPU see to its products."""
    if device.type == "cpu":
        widen_products(model.dtype)
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
