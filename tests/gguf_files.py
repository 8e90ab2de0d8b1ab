"""GGUF files to change: fields and tensors read by the format's own package, changed, and written again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

Fields = dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]
Tensors = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]
Change = Callable[[Fields, Tensors], None]
Type = gguf.GGUFValueType
FLOAT32 = gguf.GGMLQuantizationType.F32


def rewritten(source: Path, place: Path, change: Change) -> Path:
    """Write a changed copy of a GGUF file."""
    reader, fields, tensors = gguf.GGUFReader(source), Fields(), Tensors()
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            of = field.types[-1] if field.types[0] == Type.ARRAY else None
            fields[field.name] = (field.contents(), field.types[0], of)
    for tensor in reader.tensors:
        tensors[tensor.name] = (np.array(tensor.data), tensor.tensor_type)
    change(fields, tensors)
    return write(place, fields, tensors)


def write(place: Path, fields: Fields, tensors: Tensors) -> Path:
    """Write a GGUF file."""
    writer = gguf.GGUFWriter(place, fields["general.architecture"][0])
    fields = {name: field for name, field in fields.items() if name != "general.architecture"}
    for name, (value, kind, of) in fields.items():
        writer.add_key_value(name, value, kind, of)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


def network(config: PretrainedConfig) -> PreTrainedModel:
    """Make a random network, biases too, which start at zero."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


def described(model: PreTrainedModel) -> tuple[Fields, Tensors]:
    """Say what llama.cpp's own converter says of a decoder, as the format's documentation has it."""
    config, name = model.config, model.config.model_type
    numbers = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    fields = Fields({"general.architecture": (name, Type.STRING, None)})
    fields |= {f"{name}.{key}": (value, Type.UINT32, None) for key, value in numbers.items()}
    epsilon = getattr(config, "rms_norm_eps", None)
    key = "layer_norm_epsilon" if epsilon is None else "layer_norm_rms_epsilon"
    fields[f"{name}.attention.{key}"] = (epsilon or config.norm_epsilon, Type.FLOAT32, None)
    fields[f"{name}.rope.freq_base"] = (config.rope_parameters["rope_theta"], Type.FLOAT32, None)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields[f"{name}.attention.key_length"] = (width, Type.UINT32, None)
    return fields, {stored: (data, FLOAT32) for stored, data in _tensors(model, name).items()}


def _tensors(model: PreTrainedModel, name: str) -> dict[str, np.ndarray]:
    config, found = model.config, {}
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for own, tensor in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data, kind = tensor.numpy(), own.split(".")[-2]
        if name == "llama" and kind in heads:
            data = data.reshape(heads[kind], 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if name.startswith("gemma") and "norm" in own:
            data = data + 1
        found[names.get_name(own, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(data)
    return found


def vocabulary(rows: int) -> Fields:
    """Describe a byte-level tokenizer with a merge, its special tokens in the last rows."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    tokens += [f"<unused{index}>" for index in range(rows - len(tokens) - len(tiny.SPECIALS))] + tiny.SPECIALS
    types = [1] * (rows - len(tiny.SPECIALS)) + [3] * len(tiny.SPECIALS)
    return {
        "tokenizer.ggml.model": ("gpt2", Type.STRING, None),
        "tokenizer.ggml.pre": ("gpt-2", Type.STRING, None),
        "tokenizer.ggml.tokens": (tokens, Type.ARRAY, Type.STRING),
        "tokenizer.ggml.token_type": (types, Type.ARRAY, Type.INT32),
        "tokenizer.ggml.merges": (["h e"], Type.ARRAY, Type.STRING),
        "tokenizer.ggml.eos_token_id": (rows - 1, Type.UINT32, None),
    }
