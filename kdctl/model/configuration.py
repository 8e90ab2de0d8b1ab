"""Model configurations: what is read of them before any weight, and those that kdctl does not handle."""

import re
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from kdctl.base.errors import ModelError, brief

ENDLESS = re.compile(r'"(?:num_hidden_layers|num_layers|n_layers?)"\s*:\s*(\d{5,})')
"""Numbers of layers that no network has and that would take hours to lay out."""
OTHER_PARTS = {"vision_config", "audio_config"}


def read_config(path: Path) -> PretrainedConfig:
    """Read a model's configuration from a folder, without its weights and without the author's code.

    Raises ModelError if it is damaged, impossible, or of a model that is more than one network for text.
    """
    config, text = read_parts(path)
    if is_composite(config, text):
        raise composite(path, config, text, "only a teacher's is, as teacher.model")
    return usable(config, path)


def read_parts(path: Path) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Read a model's configuration, and the part of it that describes the network for text, often itself.

    Raises ModelError if it is damaged or that of an encoder with a decoder.
    """
    try:
        check_layers(path / "config.json")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
        if not isinstance(text, PretrainedConfig):
            raise ModelError(f"{path}: the configuration of the text part is {text!r:.60}, not an object of settings")
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - any value can stand in the file, and every class fails in its own way
        raise ModelError(f"{path}: the model's configuration cannot be read: {reason(error)}") from None
    if config.is_encoder_decoder:
        raise ModelError(
            f"{path}: model type {config.model_type!r} is an encoder with a decoder, and kdctl distills causal "
            "language models only, which read and write one sequence"
        )
    config._attn_implementation = None  # the file's choice, which may be code from elsewhere, is not kdctl's
    return config, text


def is_composite(config: PretrainedConfig, text: PretrainedConfig) -> bool:
    """Tell whether a model has parts for pictures or sound beside its text part."""
    return text is not config or not OTHER_PARTS.isdisjoint(config.sub_configs)


def composite(path: Path, config: PretrainedConfig, text: PretrainedConfig, why: str) -> ModelError:
    """Say why a composite model is not used."""
    return ModelError(
        f"{path}: model type {config.model_type!r} is a composite model, with parts for pictures or sound, and its "
        f"text part {text.model_type!r} is not used: {why}; kdctl distills text models only, so use one"
    )


def check_layers(file: Path) -> None:
    """Raise ModelError if a file asks for more layers than any network has."""
    found = ENDLESS.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    if found:
        raise ModelError(f"{file}: {found[0]} is no number of layers of a network; the file is damaged")


def usable(config: PretrainedConfig, path: Path) -> PretrainedConfig:
    """Return a configuration without a padding token that no row stands for: kdctl pads nothing.

    Raises ModelError if it does not say how large the network is.
    """
    for name, least in (("vocab_size", None), ("hidden_size", 1)):
        size = getattr(config, name, least)
        if not isinstance(size, int) or size < 1:
            raise ModelError(f"{path}: {name}={size!r} in the model's configuration is no size of a network")
    if getattr(config, "transformers_weights", None):
        raise ModelError(f"{path}: config.json names a file of weights of its own (transformers_weights); remove that")
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and not (isinstance(pad, int) and 0 <= pad < config.vocab_size):
        config.pad_token_id = None
    config._attn_implementation = None  # the file's choice, which may be code from elsewhere, is not kdctl's
    return config


def reason(error: Exception) -> str:
    """Return why transformers cannot open something; that it asks for the author's code is kdctl's to explain."""
    if "trust_remote_code" in str(error):
        return (
            "it works only with code that its author put beside the weights, and kdctl runs no code from model "
            "folders; use a model of a type that transformers has"
        )
    if "Unrecognized configuration class" in str(error):
        return "transformers opens no causal language model of this type"
    return f"{type(error).__name__}: {brief(error)}"
