"""The rotary embedding that a GGUF file describes, in transformers' words; every key of it is used or refused.

llama.cpp divides frequencies by one factor (type "linear"; https://arxiv.org/abs/2306.15595), by a factor for each
(``rope_freqs.weight``, which is how Llama 3's scaling is stored), or as YaRN does (https://arxiv.org/abs/2309.00071).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from kdctl.base.errors import ModelError
from kdctl.model.gguf_file import GgufFile
from kdctl.model.gguf_names import ROPE_FREQS, rope_factors

ROUNDING = 4e-6
"""Two ways to compute the same factor in single precision differ by less than this, relative."""
COMMON_FACTORS = (8.0, 32.0, 16.0, 4.0, 2.0)
"""Where the slowest frequency is not slow enough to show the whole factor."""
USUAL_HIGH = 4.0
FINE = 2.0**20
LONGER = 2**62
NEUTRAL = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "factor": 1.0}
YARN = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
WITHOUT_EFFECT = {"finetuned", "original_context_length"}
"""llama.cpp computes with the original length for YaRN and longrope alone."""


def rope_parameters(file: GgufFile, theta: float, width: int, context: int) -> dict[str, Any]:
    """Return transformers' ``rope_parameters``.

    theta: base of the frequencies. width: dimensions of a head. context: positions the model was trained for.
    Raises ModelError for a scaling that transformers does not compute.
    """
    found = {"rope_theta": theta} | _by_type(file, context)
    if ROPE_FREQS not in file.tensors:
        return found
    if found["rope_type"] != "default":
        raise ModelError(f"{file.path}: {ROPE_FREQS} and rope.scaling.type={found['rope_type']} at once are not read")
    return _by_factors(file, theta, width)


def _by_type(file: GgufFile, context: int) -> dict[str, Any]:
    """Read the scaling keys; without a type a factor is linear, as llama.cpp has it."""
    prefix = f"{file.architecture}.rope.scaling."
    keys = {key.removeprefix(prefix): value for key, value in file.fields.items() if key.startswith(prefix)}
    old = file.fields.get(f"{file.architecture}.rope.scale_linear")
    kind, factor = keys.pop("type", "linear"), keys.get("factor", old)
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"{file.path}: rope.scaling.type={kind!r} is not read; its positions would mean others")
    used = {"none": {"factor"}, "linear": {"factor"}, "yarn": {*YARN}}[kind] | WITHOUT_EFFECT
    for key, value in keys.items():
        if key not in used and NEUTRAL.get(key) != value:
            raise ModelError(f"{file.path}: {prefix}{key}={value!r} is not read; its positions would mean others")
    if kind == "none" or factor in (None, 0, 1):
        return {"rope_type": "default"}
    if not isinstance(factor, (int, float)) or not factor > 0 or not math.isfinite(factor):
        raise ModelError(f"{file.path}: {prefix}factor={factor!r} is not a positive number")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    named = {YARN[key]: value for key, value in keys.items() if key in YARN}
    return {"rope_type": "yarn", "original_max_position_embeddings": context} | named


def _by_factors(file: GgufFile, theta: float, width: int) -> dict[str, Any]:
    """Find the scaling whose factors a file stores. Raises ModelError if there is none."""
    shape = file.tensors[ROPE_FREQS].shape
    if shape != (width // 2,):
        raise ModelError(f"{file.path}: {ROPE_FREQS} has the shape {shape}, not ({width // 2},)")
    factors = file.read(ROPE_FREQS)
    original = file.fields.get(f"{file.architecture}.rope.scaling.original_context_length")
    found = of_factors(factors, theta, width, original if type(original) is int and original > 0 else None)
    if found is not None:
        return found
    raise ModelError(
        f"{file.path}: the factors in {ROPE_FREQS} are neither one number nor those of Llama 3's scaling, which are "
        "what transformers computes; without them the model would be another one"
    )


def of_factors(factors: Tensor, theta: float, width: int, original: int | None) -> dict[str, Any] | None:
    """Find the scaling that gives these factors, None if none does. original: the length it was made for, if known."""
    for found in _candidates(factors, theta, width, original):
        parameters = {"rope_theta": theta} | found
        if same_factors(factors, parameters, width):
            return parameters
    return None


def same_factors(factors: Tensor, parameters: dict[str, Any], width: int) -> bool:
    """Tell whether a scaling gives these factors."""
    network: dict[str, Any] = {"hidden_size": width, "num_attention_heads": 1, "max_position_embeddings": LONGER}
    computed = rope_factors(LlamaConfig(**network, rope_parameters=parameters))
    computed = torch.ones_like(factors) if computed is None else computed
    return bool(((computed / factors - 1).abs() <= ROUNDING).all())


def _candidates(factors: Tensor, theta: float, width: int, original: int | None) -> Iterator[dict[str, Any]]:
    """Yield what the scaling may be, round numbers first."""
    largest = float(f"{float(factors.max()):.6g}")
    if not bool((factors > 0).all()) or not math.isfinite(largest):
        return
    yield {"rope_type": "default"}
    yield {"rope_type": "linear", "factor": largest}
    turns = theta ** -(torch.arange(0, width, 2).double() / width) / (2 * math.pi)
    for factor in (largest, *COMMON_FACTORS):
        smooth = (1 / factors.double() - 1 / factor) / (1 - 1 / factor) if factor > 1 else torch.tensor([-1.0])
        if factor < largest or bool((smooth < -ROUNDING).any()):
            continue
        for low, high, length in _bands(smooth, turns, original):
            yield {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }


def _bands(smooth: Tensor, turns: Tensor, original: int | None) -> Iterator[tuple[float, float, int]]:
    """Yield low factor, high factor and original length of Llama 3's scaling.

    smooth: s of each factor f, 1/f = (1 - s)/F + s, held between 0 and 1. turns: frequencies, in turns a position.
    s = (length * turns - low) / (high - low) is a straight line, of which only the ratio of the three numbers can be
    seen: low is 1 unless the length is known, and no length is a whole number unless all are multiplied.
    """
    inside = ((smooth > ROUNDING) & (smooth < 1 - ROUNDING)).nonzero().flatten().tolist()
    for high, length in _line(smooth, turns, inside) if inside else _step(int((smooth >= 1 - ROUNDING).sum()), turns):
        if not 1 < high < FINE or not 0 < length < FINE**2:
            continue
        scale = original / length if original else 1.0
        yield round(scale, 3), round(high * scale, 3), max(1, round(length * scale))
        yield 1.0, high, max(1, round(length))
        yield FINE, high * FINE, max(1, round(length * FINE))


def _line(smooth: Tensor, turns: Tensor, inside: list[int]) -> Iterator[tuple[float, float]]:
    """Yield high factor and length from the factors inside the band.

    A single one fits bands of any width that its neighbours leave: the usual one, and one to the next frequency.
    """
    first, last = inside[0], inside[-1]
    if first == last:
        for high in (USUAL_HIGH, float(turns[0] / turns[1])) if len(turns) > 1 else (USUAL_HIGH,):
            yield high, (1 + float(smooth[first]) * (high - 1)) / float(turns[first])
        return
    slope = float((smooth[first] - smooth[last]) / (turns[first] - turns[last]))
    below = slope * float(turns[first]) - float(smooth[first])  # low / (high - low)
    if below > 0:
        yield 1 + 1 / below, slope / below


def _step(before: int, turns: Tensor) -> Iterator[tuple[float, float]]:
    """Yield high factor and length of a band between two frequencies, the first of which is the last one unscaled."""
    if 0 < before < len(turns):
        ratio = float(turns[before - 1] / turns[before])
        yield ratio**0.5, ratio**0.75 / float(turns[before - 1])
