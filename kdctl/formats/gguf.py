"""How llama.cpp names, orders and describes a model: architectures, tensor names, row order, metadata, tokenizer.

Only what is known to mean the same in llama.cpp is written; everything else is refused by name before any work.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError
from kdctl.formats.gguf_blocks import BLOCK, Blocks, block_kind, to_blocks
from kdctl.formats.student import Student
from kdctl.model.gguf_names import (
    ARCHITECTURES,
    CONFIG,
    ROPE_FREQS,
    STOP_IDS,
    context_length,
    head_dim,
    rope_factors,
    rope_type,
    row_order,
    stored_names,
)
from kdctl.quant.affine import Grid, QParams, QuantizedWeight

FILE_TYPES = {
    gguf.GGMLQuantizationType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    gguf.GGMLQuantizationType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    gguf.GGMLQuantizationType.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    gguf.GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
ROPE_TYPES = ("default", "linear", "llama3")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


def check_layout(config: PretrainedConfig, grid: Grid) -> None:
    """Raise ModelError for a model or a grid that llama.cpp's files do not hold."""
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"model type {config.model_type!r} is not written as GGUF, only {', '.join(ARCHITECTURES)}: llama.cpp "
            "wants every family's tensors in an order of its own; use --to dense and llama.cpp's own converter"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"hidden_act={config.hidden_act!r}: llama.cpp computes silu for {config.model_type} models")
    kind = rope_type(config)
    if kind not in ROPE_TYPES or (kind != "default" and ARCHITECTURES[config.model_type] != gguf.MODEL_ARCH.LLAMA):
        raise ModelError(
            f"rope_type={kind!r} of a {config.model_type} model is not written as GGUF; use --to dense and llama.cpp's "
            "own converter"
        )
    if grid.group_size % BLOCK:
        raise ModelError(
            f"group_size={grid.group_size} is not a multiple of {BLOCK}, the weights that share a scale in GGUF; "
            "quantize with group_size 32, 64 or 128"
        )
    if grid.bits == 8 and not grid.symmetric:
        raise ModelError("asymmetric 8-bit codes have no GGUF type; quantize with symmetric=true")


def ordered(weight: QuantizedWeight, order: Tensor | None) -> QuantizedWeight:
    """Reorder the rows of a weight on the grid: codes, scales and zero points alike."""
    if order is None:
        return weight
    qparams = QParams(weight.qparams.scale[order], weight.qparams.zero_point[order])
    return QuantizedWeight(weight.codes[order], qparams, weight.grid)


def quantized_blocks(student: Student, exact: bool) -> dict[str, Blocks]:
    """Lay out every quantized layer, by the name of its weight in the model.

    Raises ModelError where a scale is beyond half precision.
    """
    found = {}
    for name, weight in student.weights.items():
        if not bool(weight.qparams.scale.half().isfinite().all()):
            largest = float(weight.qparams.scale.max())
            raise ModelError(
                f"{name}: a scale of {largest:g} is beyond half precision (65504), which GGUF stores; use --to dense"
            )
        order = row_order(name, student.model.config)
        found[f"{name}.weight"] = to_blocks(ordered(weight, order), block_kind(weight.grid, exact))
    return found


def plain_tensor(name: str, tensor: Tensor, config: PretrainedConfig) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Return the bytes and the type of a tensor that is not quantized: vectors in single precision, matrices as is."""
    order = row_order(name.rpartition(".")[0], config)
    tensor = tensor if order is None else tensor[order]
    if tensor.ndim == 1:
        tensor = tensor.float()
    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    return tensor.contiguous().view(torch.uint8).numpy(), kinds[tensor.dtype]


def add_model_fields(writer: gguf.GGUFWriter, config: PretrainedConfig, kind: gguf.GGMLQuantizationType) -> None:
    """Describe the network."""
    kept = config.to_diff_dict() | {"model_type": config.model_type}
    for name in ("quantization_config", "transformers_version", "dtype"):
        kept.pop(name, None)
    writer.add_string(CONFIG, json.dumps(kept))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """Describe a byte-level BPE tokenizer: pre, tokens, types, merges. Raises ModelError for any other kind."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    model = spec["model"]
    normalizer = (spec["normalizer"] or {"type": "NFC"})["type"]
    if model["type"] != "BPE" or model["byte_fallback"] or normalizer != "NFC":
        raise ModelError(
            f"the tokenizer ({model['type']}, normalizer {normalizer}) is not byte-level BPE, the only kind that is "
            "written as GGUF; use --to dense and llama.cpp's own converter"
        )
    types = gguf.TokenType
    tokens = {index: (token, types.NORMAL) for token, index in model["vocab"].items()}
    for added in spec["added_tokens"]:
        tokens[added["id"]] = (added["content"], types.CONTROL if added["special"] else types.USER_DEFINED)
    listed = [tokens.get(index, (f"[PAD{index}]", types.UNUSED)) for index in range(vocab_size)]
    return {
        "pre": pre_tokenizer_name(spec["pre_tokenizer"]),
        "tokens": [token for token, _ in listed],
        "types": [int(kind) for _, kind in listed],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }


def pre_tokenizer_name(spec: dict[str, Any] | None) -> str:
    """Name llama.cpp's pre-tokenizer that splits like this one. Raises ModelError if none is known to."""
    steps = spec["pretokenizers"] if spec and spec["type"] == "Sequence" else [spec or {"type": "none"}]
    kinds = [step["type"] for step in steps]
    if kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        own_split = steps[-1]["use_regex"]
        if kinds == ["ByteLevel"] and own_split:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and own_split and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own_split and steps[0]["behavior"] == "Isolated":
            pattern = steps[0]["pattern"].get("Regex")
            if pattern in SPLITS and not steps[0]["invert"]:
                return SPLITS[pattern]
    raise ModelError(
        f"no pre-tokenizer of llama.cpp is known to split text like this tokenizer's ({' + '.join(kinds)}), and with "
        "another one the model would read other tokens; use --to dense and llama.cpp's own converter"
    )


def add_tokenizer_fields(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Describe the tokenizer, its special tokens and the chat template."""
    fields = tokenizer_fields(tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["types"])
    writer.add_token_merges(fields["merges"])
    specials = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, index in specials.items():
        if isinstance(index, int):
            add(index)
    first = tokenizer("a")["input_ids"][0]  # pyright: ignore[reportIndexIssue]
    writer.add_add_bos_token(first == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    writer.add_string(gguf.Keys.Tokenizer.HF_JSON, tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    if isinstance(tokenizer.chat_template, dict):
        named = [{"name": name, "template": text} for name, text in tokenizer.chat_template.items()]
        writer.add_chat_template(named)
    elif tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def add_stops(writer: gguf.GGUFWriter, stops: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Say which tokens end a completion: llama.cpp has room for two beside the end of sequence."""
    if stops:
        writer.add_array(STOP_IDS, list(stops))
    others = [index for index in stops if index != tokenizer.eos_token_id]
    for add, index in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(index)


def write_gguf(
    path: Path,
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    blocks: dict[str, Blocks],
    name: str,
    stops: Sequence[int] = (),
) -> None:
    """Write a GGUF file. stops: tokens that end a completion."""
    config, model = student.model.config, student.model
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_name(name)
    add_model_fields(writer, config, next(iter(blocks.values())).kind)
    add_tokenizer_fields(writer, tokenizer, config.vocab_size)
    add_stops(writer, stops, tokenizer)
    if (factors := rope_factors(config)) is not None:
        writer.add_tensor(ROPE_FREQS, factors.numpy())
    state = model.state_dict()
    for own, stored in stored_names(state, config).items():
        found = blocks.get(own)
        data, kind = (found.data, found.kind) if found else plain_tensor(own, state[own], config)
        writer.add_tensor(stored, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
