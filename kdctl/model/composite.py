"""Composite models, which have parts for pictures or sound beside one for text: the text part as a model by itself.

transformers loads the whole. Its decoder and output head become a causal language model, which has to give the whole's
own log-probabilities for text.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kdctl.base.errors import ModelError, brief
from kdctl.model.configuration import composite, is_composite, read_parts, reason, usable
from kdctl.model.load import check_complete, check_tied, from_tensors, open_weights, skeleton
from kdctl.model.sound import LEAST, Probe, check_weights, largest, narrowed
from kdctl.model.stops import configured

PLAIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text parts without a causal language model of their own, and the one that computes the same: where no picture gives a
token three places, its place along each axis is the same."""
PICTURE_KEYS = ("mrope_section", "mrope_interleaved")


def has_text_part(path: Path) -> bool:
    """Tell whether a folder holds a composite model."""
    return is_composite(*read_parts(path))


def text_config(path: Path) -> PretrainedConfig:
    """Return the configuration of a composite model's text part. No weight is read.

    Raises ModelError if it is damaged, or transformers has no causal language model for the part.
    """
    config, text = read_parts(path)
    try:
        kind = PLAIN.get(text.model_type, text.model_type)
        if text is not config and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return usable(_of_part(path, config, text, kind), path)
        why = "it cannot be told apart" if text is config else "transformers has no causal language model for that part"
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - any value can stand in the file, and every class fails in its own way
        why = f"it cannot be built: {reason(error)}"
    raise composite(path, config, text, why)


def _of_part(path: Path, config: PretrainedConfig, text: PretrainedConfig, kind: str) -> PretrainedConfig:
    """Describe a text part alone, its head tied and its completions ended as in the whole."""
    found = copy.deepcopy(text) if kind == text.model_type else _plain(text, kind)
    with torch.device("meta"):
        whole = AutoModelForMultimodalLM.from_config(config, trust_remote_code=False)
    head, embeddings = whole.get_output_embeddings(), whole.get_input_embeddings()
    found.tie_word_embeddings = isinstance(head, nn.Module) and head.weight is embeddings.weight
    found.eos_token_id = configured(path)[1]
    quantized = config.to_dict().get("quantization_config")
    if quantized is not None:
        found.quantization_config = quantized
    return found


def _plain(text: PretrainedConfig, kind: str) -> PretrainedConfig:
    """Describe a text part in the words of another kind of model that computes the same."""
    usual: Any = CONFIG_MAPPING[kind]
    words = {name: value for name, value in text.to_dict().items() if hasattr(usual(), name) and name != "model_type"}
    rope = {name: value for name, value in (text.rope_parameters or {}).items() if name not in PICTURE_KEYS}
    return usual(**words | {"rope_parameters": rope})


def text_model(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load a composite model and return its text part. config: the part's, from ``text_config``.

    Raises ModelError if a tensor of the part is missing or not used, or if it gives other numbers than the whole.
    """
    network = skeleton(config)
    whole_config, text = read_parts(path)
    whole, found = open_weights(AutoModelForMultimodalLM, path, whole_config, dtype)
    check_complete(path, _of_text(whole, found))
    try:
        tensors = dict(_tensors(whole, network))
        model = from_tensors(config, tensors, dtype)
        check_tied(path, model)
        check_weights(model)
        why = _other_tensors(model, tensors) or _other_numbers(whole.eval(), model.eval())
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a network's own code fails in any way
        why = f"it cannot be taken out: {type(error).__name__}: {brief(error)}"
    if why:
        raise composite(path, whole_config, text, why)
    return model


def _decoder(whole: PreTrainedModel) -> nn.Module:
    """Return what makes final hidden states of tokens in a composite model."""
    part = whole.get_decoder()
    return part.base_model if isinstance(part, PreTrainedModel) else part


def _of_text(whole: PreTrainedModel, found: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Leave out what is missing, left over or of another shape in the other parts of a composite model."""
    used = {id(module) for part in (_decoder(whole), whole.get_output_embeddings()) for module in part.modules()}  # pyright: ignore
    others = tuple(f"{name}." for name, module in whole.named_modules() if used.isdisjoint(map(id, module.modules())))
    return {
        kind: [entry for entry in found[kind] if not (entry if isinstance(entry, str) else entry[0]).startswith(others)]
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def _tensors(whole: PreTrainedModel, network: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the text part by their names in a network of its own, without a tied head."""
    for name, tensor in _decoder(whole).state_dict().items():
        yield f"{network.base_model_prefix}.{name}", tensor
    head: Any = whole.get_output_embeddings()
    own = next(name for name, module in network.named_modules() if module is network.get_output_embeddings())
    if head.weight is not whole.get_input_embeddings().weight:
        yield from ((f"{own}.{name}", tensor) for name, tensor in head.state_dict().items())


def _other_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> str:
    """Say which tensor of the text part has no place in a network of its own, or which of that is made up."""
    own = model.state_dict()
    lost = [name for name, tensor in tensors.items() if name not in own or not torch.equal(own[name], tensor)]
    there = {own[name].data_ptr() for name in tensors if name in own}
    made_up = [name for name, tensor in own.items() if tensor.data_ptr() not in there]
    return f"the part alone differs in {(lost + made_up)[0]}" if lost or made_up else ""


def _other_numbers(whole: PreTrainedModel, model: PreTrainedModel) -> str:
    """Say how far the log-probabilities of the part alone are from the whole's."""
    alone, among = Probe(model), Probe(whole)
    with torch.no_grad(), narrowed(model), narrowed(whole):
        alone.check_finite()
        gap = largest(alone.plain(among.ids), among.joined)
    if gap <= LEAST[model.dtype]:
        return ""
    return f"alone it gives other numbers for text, log-probabilities {gap:.2g} nats off on average"
