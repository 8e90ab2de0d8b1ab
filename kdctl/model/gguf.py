"""GGUF files as models: the configuration, and the network with the tokens that end a completion."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kdctl.base.errors import ModelError
from kdctl.model.gguf_file import GgufFile
from kdctl.model.gguf_foreign import build_foreign, foreign_config
from kdctl.model.gguf_names import STOP_IDS
from kdctl.model.gguf_network import NATIVE, build_network, network_config

ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Keys of the tokens at which llama.cpp stops: end of sequence, of a turn, of a message."""


def gguf_config(file: GgufFile) -> PretrainedConfig:
    """Return the configuration that a file describes. Raises ModelError if a part of it cannot be used."""
    _check_kind(file)
    return network_config(file) if file.architecture in NATIVE else foreign_config(file)


def gguf_model(file: GgufFile, dtype: torch.dtype) -> PreTrainedModel:
    """Build the network with the file's weights. Raises ModelError if a part of the file is missing or not used."""
    _check_kind(file)
    model = build_network(file, dtype) if file.architecture in NATIVE else build_foreign(file, dtype)
    ends = file.field(STOP_IDS, list) or [file.field(f"tokenizer.ggml.{name}", int) for name in ENDS]
    ends = sorted({index for index in ends if index is not None})
    if not all(type(index) is int and 0 <= index < model.config.vocab_size for index in ends):
        raise ModelError(f"{file.path}: the tokens {ends} that end a completion are not all in its vocabulary")
    if len(ends) > 1 and model.generation_config is not None:
        model.generation_config.eos_token_id = ends
    return model


def _check_kind(file: GgufFile) -> None:
    """Refuse files that hold no whole model: adapters, projectors, parts."""
    kind, parts = file.fields.get("general.type", "model"), file.fields.get("split.count", 1)
    if kind != "model":
        raise ModelError(f"{file.path} holds general.type={kind!r:.80}, not a model; name the model's own file")
    if parts != 1:
        raise ModelError(f"{file.path} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST OUT")
