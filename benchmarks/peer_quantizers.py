"""Quantize a folder with another tool, in that tool's own environment: what benchmarks/quality.py runs.

    PEER/bin/python benchmarks/peer_quantizers.py METHOD MODEL CALIBRATION.json OUT --bits 4 --group-size 64

Imports nothing of kdctl. CALIBRATION.json is a list of token id lists. The last line printed is JSON with the seconds
that quantizing took, without loading and saving.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 256


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    return parser.parse_args()


def loaded(given: argparse.Namespace) -> tuple[Any, Any]:
    """Load model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="bfloat16")
    return model, AutoTokenizer.from_pretrained(given.model)


def with_llm_compressor(given: argparse.Namespace, modifiers: Callable[[dict[str, Any]], list[Any]]) -> float:
    """Run llm-compressor's one-shot quantization and save what it made."""
    from datasets import Dataset
    from llmcompressor import oneshot

    model, tokenizer = loaded(given)
    rows = [ids[:LONGEST] for ids in json.loads(given.calibration.read_text())]
    data = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows])
    weights = {"num_bits": given.bits, "type": "int", "symmetric": False, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": {**weights, "group_size": given.group_size}}}
    started = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=modifiers(groups),
        max_seq_length=LONGEST,
        num_calibration_samples=len(rows),
    )
    seconds = time.perf_counter() - started
    model.save_pretrained(given.out, save_compressed=True)
    tokenizer.save_pretrained(given.out)
    return seconds


def llm_compressor_gptq(given: argparse.Namespace) -> float:
    """Quantize by GPTQ, as llm-compressor sets it."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return with_llm_compressor(given, lambda groups: [GPTQModifier(config_groups=groups, ignore=["lm_head"])])


def llm_compressor_awq(given: argparse.Namespace) -> float:
    """Quantize by AWQ, as llm-compressor sets it."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_, **__: None  # fails where there is no accelerator

    def modifiers(groups: dict[str, Any]) -> list[Any]:
        return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]

    return with_llm_compressor(given, modifiers)


def auto_round(given: argparse.Namespace, iterations: int = 200) -> float:
    """Quantize by AutoRound."""
    import torch
    from auto_round import AutoRound

    model, tokenizer = loaded(given)
    rows = [torch.tensor([ids[:LONGEST]]) for ids in json.loads(given.calibration.read_text())]
    length = min(row.shape[-1] for row in rows)
    tool = AutoRound(
        model,
        tokenizer,
        bits=given.bits,
        group_size=given.group_size,
        sym=False,
        iters=iterations,
        dataset=[row[:, :length] for row in rows],
        seqlen=length,
        nsamples=len(rows),
        device_map="cpu",
    )
    started = time.perf_counter()
    tool.quantize()
    seconds = time.perf_counter() - started
    tool.save_quantized(str(given.out), format="llm_compressor" if given.bits == 8 else "auto_round")
    return seconds


METHODS: dict[str, Callable[[argparse.Namespace], float]] = {
    "llm-compressor-gptq": llm_compressor_gptq,
    "llm-compressor-awq": llm_compressor_awq,
    "auto-round": auto_round,
    "auto-round-50": lambda given: auto_round(given, 50),
}


def main() -> None:
    """Quantize and say how long it took."""
    given = arguments()
    print(json.dumps({"seconds": METHODS[given.method](given)}))


if __name__ == "__main__":
    main()
