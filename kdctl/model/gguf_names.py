"""What a network is called in llama.cpp's files: architectures, tensors, the order of rows, factors of the rotation."""

from collections.abc import Iterable

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kdctl.base.errors import ModelError

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
ROPE_FREQS = "rope_freqs.weight"
CONFIG = "kdctl.config"
"""Key under which kdctl keeps a model's own configuration, which llama.cpp's keys do not hold to the last digit."""
STOP_IDS = "kdctl.stop_ids"


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one attention head."""
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def context_length(config: PretrainedConfig) -> int:
    """Return the longest sequence that is computed alike with and without a sliding window, which is not described."""
    window = config.to_dict().get("sliding_window") or config.max_position_embeddings
    return min(window, config.max_position_embeddings)


def rope_type(config: PretrainedConfig) -> str:
    """Return the kind of rotary position embedding."""
    return (config.rope_parameters or {}).get("rope_type", "default")


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """Return what llama.cpp divides each rotary frequency by, (head_dim / 2) float32; None where nothing is scaled."""
    if rope_type(config) == "default":
        return None
    width = head_dim(config)
    scaled, _ = ROPE_INIT_FUNCTIONS[rope_type(config)](config, torch.device("cpu"))
    base = config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    return 1 / (base * scaled.float())


def row_order(name: str, config: PretrainedConfig) -> Tensor | None:
    """Return the rows of a query or key projection (weight or bias) as llama.cpp wants them, or None for "as they are".

    Llama's rotary embedding pairs dimension i with i + half; llama.cpp's ``llama`` architecture pairs neighbours.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-1])
    if heads is None or ARCHITECTURES[config.model_type] != gguf.MODEL_ARCH.LLAMA:
        return None
    return torch.arange(heads * head_dim(config)).view(heads, 2, -1).transpose(1, 2).flatten()


def stored_names(names: Iterable[str], config: PretrainedConfig) -> dict[str, str]:
    """Map the names of a model's tensors to llama.cpp's, a tied head left out. Raises ModelError if one has none."""
    table = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    found = {}
    for name in names:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ModelError(f"llama.cpp has no tensor for {name} of a {config.model_type} model")
        found[name] = stored
    return found
