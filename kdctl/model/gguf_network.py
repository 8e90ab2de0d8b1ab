"""A GGUF file as a network of transformers: its configuration and its tensors, of which each is used or refused.

The exact inverse of what ``kdctl export --to gguf`` writes, for the architectures that kdctl writes.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from kdctl.base.errors import ModelError
from kdctl.model.gguf_file import GgufFile
from kdctl.model.gguf_names import CONFIG, ROPE_FREQS, context_length, head_dim, rope_type, row_order, stored_names
from kdctl.model.gguf_rope import rope_parameters, same_factors
from kdctl.model.load import skeleton

NATIVE = ("llama", "qwen2", "qwen3")
DEFAULT_THETA = 10000.0
LARGEST = 2**31
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
COMPUTED: Mapping[str, Callable[[PretrainedConfig], Any]] = {
    "vocab_size": lambda config: config.vocab_size,
    "context_length": context_length,
    "embedding_length": lambda config: config.hidden_size,
    "block_count": lambda config: config.num_hidden_layers,
    "feed_forward_length": lambda config: config.intermediate_size,
    "attention.head_count": lambda config: config.num_attention_heads,
    "attention.head_count_kv": lambda config: config.num_key_value_heads,
    "attention.key_length": head_dim,
    "attention.value_length": head_dim,
    "attention.layer_norm_rms_epsilon": lambda config: config.rms_norm_eps,
    "attention.causal": lambda _: True,
    "rope.dimension_count": head_dim,
    "rope.freq_base": lambda config: config.rope_parameters["rope_theta"],
    "expert_count": lambda _: 0,
    "expert_used_count": lambda _: 0,
    "pooling_type": lambda _: 0,
}
"""What a network of transformers computes with, by the key that says it in a file."""
WITHOUT_EFFECT = {"tensor_data_layout"}
REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
BIASES = {"attention_bias": ("attn_q", "attn_k", "attn_v"), "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")}
OUTPUT_BIAS = "attn_output"


def network_config(file: GgufFile) -> PretrainedConfig:
    """Return the configuration that a file describes.

    Raises ModelError for a key that is missing, or that transformers does not compute as llama.cpp does.
    """
    words = _own_words(file) if CONFIG in file.fields else _words(file)
    layers = words.get("num_hidden_layers")
    if type(layers) is not int or not 1 <= layers <= len(file.tensors):
        raise ModelError(f"{file.path}: {file.architecture}.block_count={layers!r:.80} of {len(file.tensors)} tensors")
    try:
        config = AutoConfig.for_model(**words)
    except Exception as error:  # noqa: BLE001 - whatever values of a foreign file make of the checks
        raise ModelError(f"{file.path} describes no {file.architecture} model: {error}") from None
    _check_fields(file, config)
    return config


def build_network(file: GgufFile, dtype: torch.dtype) -> PreTrainedModel:
    """Build the network with the file's weights, compared with the file. Raises ModelError if one is missing."""
    config = network_config(file)
    empty = skeleton(config)
    names = stored_names(empty.state_dict(), config)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    implied = _check_tensors(file, {stored: shapes[name] for name, stored in names.items()})
    tensors = {}
    for name, stored in names.items():
        order = row_order(name.rpartition(".")[0], config)
        tensor = torch.zeros(implied[stored]) if stored in implied else file.read(stored)
        tensors[name] = (tensor if order is None else tensor[order.argsort()]).to(dtype)
    model = type(empty).from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype)
    state = model.state_dict()
    for name, tensor in tensors.items():
        if not torch.equal(state[name], tensor):
            raise ModelError(f"{file.path}: {names[name]} is not what transformers made of it")
    return model


def _own_words(file: GgufFile) -> dict[str, Any]:
    """Read the configuration that kdctl has kept in a file of its own."""
    try:
        words = json.loads(file.fields[CONFIG])
        return {**words, "model_type": words["model_type"]}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ModelError(f"{file.path}: {CONFIG} is damaged: {error}") from None


def _words(file: GgufFile) -> dict[str, Any]:
    """Say in transformers' words what the file says in llama.cpp's."""
    heads, width = _count(file, "attention.head_count"), _count(file, "embedding_length")
    theta, context = _number(file, "rope.freq_base", DEFAULT_THETA), _count(file, "context_length")
    own_width = _count(file, "attention.key_length", _count(file, "rope.dimension_count", max(1, width // heads)))
    ids = {f"{own}_token_id": file.field(f"tokenizer.ggml.{name}_token_id", int) for name, own in SPECIAL_IDS.items()}
    words = {
        "model_type": file.architecture,
        "_model_name_or_path": file.field("general.name", str),
        "vocab_size": _count(file, "vocab_size", len(file.field("tokenizer.ggml.tokens", list) or ()) or None),
        "max_position_embeddings": context,
        "hidden_size": width,
        "num_hidden_layers": _count(file, "block_count"),
        "intermediate_size": _count(file, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _count(file, "attention.head_count_kv", heads),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(file, theta, own_width, context),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if file.architecture != "qwen2" or own_width * heads != width:
        words["head_dim"] = own_width
    return {key: value for key, value in (words | ids | _biases(file)).items() if value is not None}


def _biases(file: GgufFile) -> dict[str, bool]:
    """Tell which biases a Llama has; Qwen 2 and 3 have theirs always, or never."""
    if file.architecture != "llama":
        return {}
    kinds = {tuple(name.split(".")[2:]) for name in file.tensors if name.startswith("blk.")}
    named = {option: any((kind, "bias") in kinds for kind in parts) for option, parts in BIASES.items()}
    named["attention_bias"] |= (OUTPUT_BIAS, "bias") in kinds
    return {option: True for option, there in named.items() if there}


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    """Read a number of things."""
    value = _single(file, key, default)
    if type(value) is not int or not 1 <= value < LARGEST:
        raise ModelError(f"{file.path}: {file.architecture}.{key}={value!r:.80} is not a count")
    return value


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    """Read a positive number."""
    value = _single(file, key, default)
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise ModelError(f"{file.path}: {file.architecture}.{key}={value!r:.80} is not a positive number")
    return float(value)


def _single(file: GgufFile, key: str, default: Any) -> Any:
    """Read a value, of which there may be one for each layer if they are all the same."""
    value = file.fields.get(f"{file.architecture}.{key}", default)
    if value is None:
        raise ModelError(f"{file.path} does not say {file.architecture}.{key}, without which it is no model")
    return value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value


def _check_fields(file: GgufFile, config: PretrainedConfig) -> None:
    """Compare every key that describes the network with what the configuration computes."""
    prefix = f"{file.architecture}."
    for key in [*file.fields, *(prefix + name for name in REQUIRED)]:
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in WITHOUT_EFFECT or name.startswith("rope.scal"):
            continue
        value = _single(file, name, None)
        if name == "attention.sliding_window" and type(value) is int and value >= context_length(config):
            continue
        if name not in COMPUTED or not _equal(value, COMPUTED[name](config)):
            raise ModelError(
                f"{file.path}: {key}={value!r:.80} is not what transformers computes for a {config.model_type} model, "
                "so the converted model would be another one; use the model's own safetensors"
            )
    if CONFIG in file.fields:
        _check_rope(file, config)


def _equal(value: Any, computed: Any) -> bool:
    """Compare a number of a file, which holds single precision, with one of a configuration."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isinstance(computed, (int, float)):
        return value is computed
    return np.float32(value) == np.float32(computed)


def _check_rope(file: GgufFile, config: PretrainedConfig) -> None:
    """Compare the rotary factors of a file that kdctl wrote with those of the configuration it kept there."""
    stored, width = file.tensors.get(ROPE_FREQS), head_dim(config)
    same = stored is None and rope_type(config) == "default"
    if stored is not None and stored.shape == (width // 2,):
        same = same_factors(file.read(ROPE_FREQS), config.rope_parameters, width)
    if not same or any(key.startswith(f"{file.architecture}.rope.scal") for key in file.fields):
        raise ModelError(f"{file.path}: {ROPE_FREQS} or rope.scaling is not the scaling that {CONFIG} describes")


def _check_tensors(file: GgufFile, wanted: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
    """Refuse a tensor that is missing, of another shape, or not used. Returns the biases that are zero unsaid."""
    spared = {name: shape for name, shape in wanted.items() if name.endswith(f".{OUTPUT_BIAS}.bias")}
    implied = {} if spared.keys() & file.tensors.keys() else spared
    _refuse(file, "lacks", [name for name in wanted if name not in file.tensors and name not in implied], "incomplete")
    used = {*wanted} | ({ROPE_FREQS} if file.architecture == "llama" else set())
    extra = [name for name in file.tensors if name not in used]
    _refuse(file, f"holds, beyond a {file.architecture} model of transformers,", extra, "of another network")
    shaped = [name for name in wanted if name in file.tensors and file.tensors[name].shape != wanted[name]]
    _refuse(file, "describes another shape than it has for", shaped, "damaged")
    return implied


def _refuse(file: GgufFile, what: str, names: list[str], state: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelError(f"{file.path} {what} {', '.join(names[:3])}{more}: it is {state}, and nothing is made of it")
