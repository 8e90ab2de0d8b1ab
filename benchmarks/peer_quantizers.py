"""Quantize a folder with another tool, in that tool's own environment: what benchmarks/quality.py runs.

    PEER/bin/python benchmarks/peer_quantizers.py METHOD MODEL CALIBRATION.json OUT --bits 4 --group-size 64

Imports nothing of kdctl. CALIBRATION.json is a list of token id lists. The last line printed is JSON with the seconds
that quantizing took, without loading and saving.
"""

import argparse
import json
import os
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


def sequences(given: argparse.Namespace, longest: int | None = LONGEST) -> list[list[int]]:
    """Read the calibration sequences, cut at so many tokens."""
    return [ids[:longest] for ids in json.loads(given.calibration.read_text())]


def with_llm_compressor(given: argparse.Namespace, modifiers: Callable[[dict[str, Any]], list[Any]]) -> float:
    """Run llm-compressor's one-shot quantization and save what it made."""
    from datasets import Dataset
    from llmcompressor import oneshot

    model, tokenizer = loaded(given)
    rows = sequences(given)
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
    tokens = torch.tensor([token for ids in sequences(given, None) for token in ids])
    rows = tokens[: len(tokens) // LONGEST * LONGEST].view(-1, 1, LONGEST).unbind()  # the tool wants equal lengths
    tool = AutoRound(
        model,
        tokenizer,
        bits=given.bits,
        group_size=given.group_size,
        sym=False,
        iters=iterations,
        dataset=list(rows),
        seqlen=LONGEST,
        nsamples=len(rows),
        device_map="cpu",
    )
    started = time.perf_counter()
    tool.quantize()
    seconds = time.perf_counter() - started
    tool.save_quantized(str(given.out), format="fake")  # its own asymmetric export fails
    return seconds


def gptqmodel(given: argparse.Namespace) -> float:
    """Quantize by GPTQModel's GPTQ; what it made is written back as plain numbers, which every environment opens."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer than four cores it asks for more than it has
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.utils.model_dequant import dequantize_model

    tool = GPTQModel.load(str(given.model), QuantizeConfig(bits=given.bits, group_size=given.group_size, sym=False))
    rows = [{"input_ids": ids} for ids in sequences(given)]
    started = time.perf_counter()
    tool.quantize(rows, batch_size=8)
    seconds = time.perf_counter() - started
    packed = given.out.with_name(f"{given.out.name}-packed")
    tool.save(str(packed))
    dequantize_model(packed, given.out)
    return seconds


def trl_qat(given: argparse.Namespace, steps: int) -> float:
    """Train by TRL's GKDTrainer, forward KL on the calibration sequences, a student that torchao fake-quantizes.

    The student that is saved holds the fake-quantized weights as plain numbers. torchao's grid is symmetric.
    """
    import torch
    from datasets import Dataset
    from torch import nn
    from torch.nn.utils.rnn import pad_sequence
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import FakeQuantizedLinear, QATConfig
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    (student, tokenizer), teacher = loaded(given), loaded(given)[0]
    width = {4: torch.int4, 3: torch.int3, 2: torch.int2, 8: torch.int8}[given.bits]
    grid = IntxWeightOnlyConfig(weight_dtype=width, granularity=PerGroup(given.group_size))
    quantize_(student, QATConfig(grid, step="prepare"))

    def collated(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        padded = pad_sequence(ids, batch_first=True, padding_value=tokenizer.eos_token_id)
        labels = padded.masked_fill(mask == 0, -100)
        return {"input_ids": padded, "attention_mask": mask, "labels": labels, "prompts": padded[:, :1]}

    rows = [{"input_ids": ids} for ids in sequences(given)]
    config = GKDConfig(
        output_dir=f"{given.out}-trainer",
        per_device_train_batch_size=4,
        max_steps=steps,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        learning_rate=2e-5,
        bf16=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        data_collator=collated,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    plain, _ = loaded(given)
    with torch.no_grad():
        for name, module in student.named_modules():
            if isinstance(module, FakeQuantizedLinear):
                inner: nn.Linear = plain.get_submodule(name)
                inner.weight.copy_(module.weight_fake_quantizer(module.weight))
    plain.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    return seconds


METHODS: dict[str, Callable[[argparse.Namespace], float]] = {
    "llm-compressor-gptq": llm_compressor_gptq,
    "llm-compressor-awq": llm_compressor_awq,
    "auto-round": auto_round,
    "auto-round-50": lambda given: auto_round(given, 50),
    "gptqmodel": gptqmodel,
    "trl-torchao-qat-60-steps": lambda given: trl_qat(given, 60),
}


def main() -> None:
    """Quantize and say how long it took."""
    given = arguments()
    print(json.dumps({"seconds": METHODS[given.method](given)}))


if __name__ == "__main__":
    main()
