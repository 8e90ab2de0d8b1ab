"""GGUF files of the architectures that kdctl does not write itself: transformers converts them, and each is checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.utils.quantization_config import GgufConfig

from kdctl.base.errors import ModelError
from kdctl.model.configuration import usable
from kdctl.model.gguf_file import GgufFile
from kdctl.model.load import skeleton
from kdctl.run.files import alone

SAID: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "use_parallel_residual": ("use_parallel_residual",),
}
REQUIRED = (
    ("context_length",),
    ("embedding_length",),
    ("block_count",),
    ("feed_forward_length",),
    ("attention.head_count",),
    ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
IMPLYING = ("attention.head_count", "embedding_length", "attention.key_length")
DEFAULT_THETA = 10000.0
GIVEN: Mapping[str, Any] = {"attention.causal": True, "expert_count": 0, "rope.scaling.type": "none"}
WITHOUT_EFFECT = {"rope.scaling.finetuned"}
SOFT_CAPS = ("final_logit_softcapping", "attn_logit_softcapping")
LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the networks of 27 billion weights."""


def foreign_config(file: GgufFile) -> PretrainedConfig:
    """Return the configuration that transformers reads, if it says what the file says. Raises ModelError if not."""
    try:
        with alone(file.path) as folder:
            words = AutoConfig.from_pretrained(folder, gguf_file=file.path.name, trust_remote_code=False).to_dict()
        config = AutoConfig.for_model(**_amended(words, file))
    except Exception as error:  # noqa: BLE001 - whatever values of a foreign file make of the checks
        raise ModelError(f"{file.path} cannot be read as a GGUF model: {error}") from None
    config = usable(config, file.path)
    _check_fields(file, config)
    return config


def build_foreign(file: GgufFile, dtype: torch.dtype) -> PreTrainedModel:
    """Let transformers convert the weights, and compare each with the file. Raises ModelError if one is not used."""
    config = foreign_config(file)
    skeleton(config)
    how = GgufConfig(gguf_file=file.path.name, dequantize=True)
    options = {"config": config, "quantization_config": how, "dtype": dtype, "trust_remote_code": False}
    try:
        with alone(file.path) as folder:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file.path.name, output_loading_info=True, **options
            )  # pyright: ignore
    except Exception as error:  # noqa: BLE001 - as above
        raise ModelError(f"{file.path} cannot be read as a GGUF model: {error}") from None
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"])[:3])
        raise ModelError(f"{file.path} lacks {names}: it is incomplete, and nothing is made of it")
    _check_tensors(file, model, dtype)
    return model


def _amended(words: dict[str, Any], file: GgufFile) -> dict[str, Any]:
    """Add what transformers does not read, though it computes with it.

    llama.cpp scales Gemma's attention by the width of a head, and for 27 billion weights by hidden size / heads.
    """
    for name in SOFT_CAPS:
        if name in words:
            words[name] = file.fields.get(f"{file.architecture}.{name}", words[name])
    if "query_pre_attn_scalar" in words:
        large = words["num_hidden_layers"] == LARGE_GEMMA.get(file.architecture)
        words["query_pre_attn_scalar"] = (
            words["hidden_size"] // words["num_attention_heads"] if large else words["head_dim"]
        )
    theta = file.fields.get(f"{file.architecture}.rope.freq_base")
    window = file.fields.get(f"{file.architecture}.attention.sliding_window")
    if isinstance(words.get("rope_parameters"), dict) and "rope_theta" in words["rope_parameters"] and theta:
        words["rope_parameters"] = words["rope_parameters"] | {"rope_theta": theta}
    return words | ({"sliding_window": window} if "sliding_window" in words and window else {})


def _check_fields(file: GgufFile, config: PretrainedConfig) -> None:
    prefix, said = f"{file.architecture}.", config.to_dict()
    for choices in REQUIRED:
        if not any(prefix + name in file.fields for name in choices):
            raise ModelError(f"{file.path} does not say {prefix}{choices[0]}, without which it is no model")
    for key, value in {**_implied(file, said), **file.fields}.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name not in WITHOUT_EFFECT and not _computed(name, value, said):
            raise ModelError(
                f"{file.path}: {key}={value!r:.80} is not what transformers computes for a {file.architecture} file, "
                "so the converted model would be another one; use the model's own safetensors"
            )


def _implied(file: GgufFile, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp takes where a file does not say it, which need not be transformers' own default."""
    own = {name: file.fields.get(f"{file.architecture}.{name}") for name in IMPLYING}
    heads, width = own["attention.head_count"], own["embedding_length"]
    found = {"attention.head_count_kv": heads} if said.get("num_key_value_heads") is not None else {}
    if "rope_theta" in (said.get("rope_parameters") or {}) and type(heads) is type(width) is int and heads:
        turned = own["attention.key_length"] or width // heads
        found |= {"rope.freq_base": DEFAULT_THETA, "rope.dimension_count": turned}
    return {f"{file.architecture}.{name}": value for name, value in found.items()}


def _computed(name: str, value: Any, said: Mapping[str, Any]) -> bool:
    """Tell whether a configuration says what a key says; a number of a file is of single precision."""
    rope = said.get("rope_parameters") or {}
    width = said.get("head_dim") or said.get("hidden_size", 0) // (said.get("num_attention_heads") or 1)
    known = [said[own] for own in SAID.get(name, ()) if said.get(own) is not None]
    known += [GIVEN[name]] if name in GIVEN else []
    known += {
        "rope.freq_base": [rope.get("rope_theta")],
        "rope.dimension_count": [int(width * rope.get("partial_rotary_factor", 1.0))],
        "attention.key_length": [width],
        "attention.value_length": [width],
    }.get(name, [])
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return any(np.float32(value) == np.float32(own) if number else value == own for own in known)


def _check_tensors(file: GgufFile, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Compare each tensor of the file with what became of it, by transformers' own names and rules of order."""
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
    names, state = get_gguf_hf_weights_map(model, processor), model.state_dict()
    for stored in file.tensors:
        own = processor.process(weights=file.read(stored).numpy(), name=stored, tensor_key_mapping=names)
        if own.name not in names:
            raise ModelError(f"{file.path} holds {stored}, which no {file.architecture} model of transformers has")
        if not torch.equal(state[names[own.name]], torch.from_numpy(own.weights.copy()).to(dtype)):
            raise ModelError(f"{file.path}: {stored} is not what transformers made of it")
