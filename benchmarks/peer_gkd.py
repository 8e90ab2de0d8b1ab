"""The peer: TRL's GKDTrainer with a torchao fake-quantized student. Prints one JSON line.

Runs in an environment of its own, with torch, transformers, datasets, accelerate, trl and torchao; ``versus_trl.py``
starts it. Imports nothing of kdctl but, on request, its products for CPUs that torch has no fast ones for.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled"}

import torch
from datasets import Dataset
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class Clock(TrainerCallback):
    """Times optimizer steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.started)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path, help="JSON lines with messages, used in order")
    parser.add_argument("--lmbda", type=float, default=0.0)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--products", type=Path, help="kdctl/system/cpu_products.py, so that neither side has faster products"
    )
    return parser.parse_args()


def widen_products(file: Path) -> None:
    """Run kdctl's replacement of slow half-precision products, which needs torch alone; elsewhere it does nothing."""
    spec = importlib.util.spec_from_file_location("products", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.widen_products(torch.bfloat16)


def main() -> None:
    """Train and print the mean step."""
    args = arguments()
    torch.manual_seed(0)
    if args.products:
        widen_products(args.products)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    dataset = Dataset.from_list([{"messages": row["messages"]} for row in rows][: args.steps * args.batch_size])
    teacher, student = (AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16) for _ in range(2))
    grid = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(args.group_size))
    quantize_(student, QATConfig(grid, step="prepare"))
    config = GKDConfig(
        output_dir="peer_out",
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        max_length=args.max_tokens,
        max_new_tokens=args.max_new_tokens,
        lmbda=args.lmbda,
        beta=args.beta,
        learning_rate=2e-5,
        bf16=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    clock = Clock()
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    print(json.dumps({"step_s": clock.seconds, "mean_s": statistics.fmean(clock.seconds)}))


if __name__ == "__main__":
    main()
