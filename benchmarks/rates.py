"""Measure how fast this machine is, and print it as the record that ``kdctl plan --rates FILE`` reads.

    python benchmarks/rates.py > rates.json
    python benchmarks/rates.py --processor-time > rates.json    # where other work runs beside it

Measured are a large product in bf16, a large copy, a forward pass of one token divided by its operators, a file that is
written, flushed and hashed, and the share of the products' rate that forward and backward of four decoder layers reach,
the divergence included. Processor time is what the threads of this process spent, divided by how many they are; it has
no meaning for the disk, and none on a GPU. Between processes nothing is measured: name --link, in GB/s.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from kdctl.config.preset import QuantizeSection
from kdctl.cost.network import look_at
from kdctl.cost.records import Rates
from kdctl.cost.work import Passes
from kdctl.distill.divergence import Objective, divergence
from kdctl.model.attention import Layout, forward, use_layouts
from kdctl.model.head import head_of, token_chunk
from kdctl.model.load import linear_shapes, pick_device, quiet

GIB = 2**30
ROUNDS = 6
LENGTH = 256
DTYPE = torch.bfloat16


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=float, default=10.0, help="between processes, GB/s")
    parser.add_argument("--processor-time", action="store_true")
    return parser.parse_args()


class Clock:
    """Takes the median of several runs, the first one left out."""

    def __init__(self, device: torch.device, processor: bool, rounds: int = ROUNDS):
        self.device, self.processor, self.rounds = device, processor, rounds

    def now(self) -> float:
        """Return seconds, the device's work included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() / torch.get_num_threads() if self.processor else time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """Time some work."""
        taken = []
        for _ in range(self.rounds):
            started = self.now()
            work()
            taken.append(self.now() - started)
        return statistics.median(taken[1:])


def config(hidden: int, layers: int, vocabulary: int) -> PretrainedConfig:
    """Describe a network of the proportions of SmolLM2 and Qwen3."""
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 192,
        head_dim=64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )


def products(clock: Clock) -> float:
    """Return operations a second of a large product."""
    size = 8192 if clock.device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=clock.device, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / clock.seconds(lambda: a @ b)


def memory(clock: Clock) -> float:
    """Return bytes a second, read and written, of a large copy."""
    block = torch.zeros(GIB // 16, device=clock.device, dtype=torch.float32)
    target = torch.empty_like(block)
    return 2 * block.nbytes / clock.seconds(lambda: target.copy_(block))


def operator(clock: Clock) -> float:
    """Return the seconds that an operator takes where there is next to nothing to compute."""
    small = config(192, 8, 256)
    network = look_at(small, QuantizeSection(group_size=64), DTYPE, Objective())
    with torch.device(clock.device):
        model = use_layouts(AutoModelForCausalLM.from_config(small, dtype=DTYPE).eval())
        token = torch.zeros(1, dtype=torch.int64)

    def passed() -> None:
        with torch.no_grad():
            forward(model, token, token, Layout((1,)))

    return clock.seconds(passed) / network.operators


def whole_pass(clock: Clock) -> float:
    """Return operations a second of forward, divergence and backward of four decoder layers."""
    large = clock.device.type == "cuda"
    shape = config(2496, 4, 65536) if large else config(576, 4, 16384)
    network, rows = look_at(shape, QuantizeSection(group_size=64), DTYPE, Objective()), 16 if large else 4
    with torch.device(clock.device):
        model = use_layouts(AutoModelForCausalLM.from_config(shape, dtype=DTYPE).eval().requires_grad_(False))
        ids, places = torch.zeros(rows * LENGTH, dtype=torch.int64), torch.arange(LENGTH).repeat(rows)
    weights = [model.get_parameter(f"{name}.weight").requires_grad_(True) for name in linear_shapes(model)]

    def step() -> None:
        hidden = forward(model, ids, places, Layout((LENGTH,) * rows))
        loss = divergence(hidden, hidden.detach(), head_of(model), Objective(), token_chunk(network.vocabulary))
        torch.autograd.grad(loss, weights)

    passes, tokens = Passes(network), rows * LENGTH
    counted = passes.training(tokens, LENGTH, "none").products + passes.head(tokens, 3).products
    return counted / clock.seconds(step)


def disk(clock: Clock) -> float:
    """Return bytes a second of a file in the working directory that is written, flushed and hashed."""
    block = os.urandom(GIB // 8)

    def written() -> None:
        with tempfile.NamedTemporaryFile(dir=".") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
        hashlib.sha256(block).hexdigest()

    return len(block) / Clock(clock.device, processor=False).seconds(written)


def measured(clock: Clock, link: float) -> Rates:
    """Measure all of it. link: GB/s between processes."""
    device, rate = clock.device, products(clock)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return Rates(
        name=name + (" by processor time" if clock.processor else ""),
        measured=True,
        products_per_s=rate,
        reached=whole_pass(clock) / rate,
        memory_bytes_per_s=memory(clock),
        operator_s=operator(clock),
        network_bytes_per_s=1e9 * link,
        disk_bytes_per_s=disk(clock),
    )


def main() -> None:
    """Measure and print."""
    args = arguments()
    quiet()
    print(measured(Clock(pick_device("auto"), args.processor_time), args.link).model_dump_json(indent=2))


if __name__ == "__main__":
    main()
