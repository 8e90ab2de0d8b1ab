"""Models that kdctl did not make, measured beside its own: GPTQ, AWQ, compressed-tensors, plain."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CompressedTensorsConfig, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError
from kdctl.model import tokenizer as tokens
from kdctl.model.configuration import read_config
from kdctl.model.load import load_model
from kdctl.model.reference import model_folder


@dataclass(frozen=True)
class Foreign:
    """A model made elsewhere and the name of its row."""

    name: str
    reference: str
    folder: Path


def find_foreign(name: str, reference: str, dtype: torch.dtype, offline: bool) -> Foreign:
    """Find a model made elsewhere. Raises ModelError if it is not there."""
    return Foreign(name, reference, model_folder(reference, dtype, offline=offline))


def check_comparable(foreign: Foreign, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise ModelError unless a model made elsewhere gives the teacher's tokens the teacher's meaning.

    No weight is read. Special tokens and chat templates may differ: prompts are the teacher's.
    """
    own = tokens.open_tokenizer(foreign.folder)
    different = [part for part in tokens.differences(own, tokenizer) if part in (tokens.VOCABULARY, tokens.SPLITTING)]
    if different:
        raise ModelError(
            f"{foreign.reference}: {' and '.join(different)} are not the teacher's, and a KL per token between "
            "models that mean different things by a token is no number; compare models of one tokenizer"
        )
    rows = read_config(foreign.folder).vocab_size
    if rows != config.vocab_size:
        raise ModelError(
            f"{foreign.reference}: vocab_size={rows} and the teacher's is {config.vocab_size}, so their "
            "distributions are over different sets of tokens"
        )


def load_foreign(foreign: Foreign, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a model made elsewhere as transformers opens it; compressed-tensors are decompressed once.

    Raises ModelError if its format needs a package that is not installed.
    """
    quantization = read_config(foreign.folder).to_dict().get("quantization_config") or {}
    compressed = quantization.get("quant_method") == "compressed-tensors"
    how = CompressedTensorsConfig(dequantize=True) if compressed else None
    return load_model(foreign.folder, dtype, device, how)
