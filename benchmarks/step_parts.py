"""Break kdctl's training step into its parts, each beside the least time that this machine could take for it.

    python benchmarks/step_parts.py [--sequences 4 --tokens 256 --rounds 7]

Floors are counted operations divided by the rate of one large bf16 matrix product, or counted bytes divided by the rate
of one large copy, both measured in this run. Counted are the products of linear layers, of the output head and of
attention, and each reading and writing of what the optimizer and the write-back touch. Random tokens; the last three
quarters of every sequence carry loss. Runs on CUDA where there is one (``--layers``, ``--hidden``, ``--vocabulary`` and
so on describe a network of random weights in place of the quickstart's teacher).
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from parts.stand_in import add_shape, teacher_of
from transformers import PretrainedConfig

from kdctl.config.preset import DistillSection, QuantizeSection
from kdctl.config.resolve import build_preset, load_preset
from kdctl.cost.estimate import Cost
from kdctl.cost.network import look_at
from kdctl.distill.divergence import Objective, divergence
from kdctl.distill.feed import Feed
from kdctl.distill.loop import Trainer
from kdctl.distill.optimizer import update
from kdctl.distill.shadow import make_shadow
from kdctl.model.activation_checkpointing import recomputed, set_checkpointing
from kdctl.model.batch import Batch, collate, predicting_hidden, predicting_states
from kdctl.model.load import pick_device, quiet
from kdctl.quant.apply import build_student, quantize_layers, select_layers
from kdctl.run.records import Rollout

GIB = 2**30


@dataclass
class Clock:
    """Collects the seconds of named parts."""

    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what runs inside, the device's work included."""
        started = self._now()
        yield
        self.seconds.setdefault(name, []).append(self._now() - started)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def median(self, name: str) -> float:
        """Return a part's median, the first round left out."""
        return statistics.median(self.seconds[name][1:])


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--train", choices=["weights", "lora", "scales"], default="weights")
    parser.add_argument("--activation-checkpointing", choices=["none", "selective", "full"], default="selective")
    add_shape(parser)
    return parser.parse_args()


def rollouts(count: int, tokens: int, vocabulary: int) -> list[Rollout]:
    """Make sequences of random tokens."""
    ids = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    cut = tokens // 4
    return [Rollout(str(i), i, 0, row[:cut], row[cut:], None, "length", 0, 0, "teacher") for i, row in enumerate(ids)]


def timed_step(trainer: Trainer, batch: Batch, clock: Clock) -> None:
    """Do what a training step does, part by part."""
    with clock.part("whole step"):
        with clock.part("teacher forward"):
            states = predicting_states(trainer.teacher, batch)
        with clock.part("student forward"), recomputed(trainer.student):
            hidden = predicting_hidden(trainer.student, batch)
        with clock.part("loss and its gradient"):
            loss = divergence(hidden, states, trainer.head, trainer.objective, trainer.head.chunk)
        with clock.part("backward"):
            (loss / batch.completion_tokens).backward()
        with clock.part("norm and optimizer"):
            _, factor = trainer.clip()
            update(trainer.optimizer, trainer.shadow.parameters(), factor)
        with clock.part("write-back"):
            trainer.shadow.write_back()


def operations(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Count the operations of matrix products and attention in each part; recomputed ones count once."""
    config, tokens = trainer.student.config, sum(batch.seq_lens)
    linear = sum(parameter.numel() for parameter in trainer.shadow._parameters.values())
    attention = sum(2 * length * length for length in batch.seq_lens) * config.num_hidden_layers
    attention *= config.num_attention_heads * config.head_dim  # QKᵀ and PV, the causal half of each
    forward = 2 * linear * tokens + attention
    head = 2 * trainer.head.weight.numel() * batch.completion_tokens
    return {
        "teacher forward": forward,
        "student forward": forward,
        "loss and its gradient": 3 * head,
        "backward": 2 * forward,
    }


def floors(trainer: Trainer, batch: Batch, rates: tuple[float, float]) -> dict[str, float]:
    """Return the least seconds that each part could take. rates: operations and bytes a second."""
    linear = sum(parameter.numel() for parameter in trainer.shadow._parameters.values())
    trained = sum(parameter.numel() for parameter in trainer.shadow.parameters())
    parts = {name: count / rates[0] for name, count in operations(trainer, batch).items()}
    parts["norm and optimizer"] = (2 * 2 + 6 * 4) * trained / rates[1]
    parts["write-back"] = (4 + 2) * linear / rates[1]
    return parts | {"whole step": sum(parts.values())}


def rates(device: torch.device) -> tuple[float, float]:
    """Measure operations a second of a large bf16 product, and bytes a second, read and written, of a large copy."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    block = torch.zeros(GIB // 4, device=device, dtype=torch.float32)[: GIB // 16]
    target = torch.empty_like(block)
    clock = Clock(device)
    for _ in range(8):
        with clock.part("product"):
            a @ b
        with clock.part("copy"):
            target.copy_(block)
    return 2 * size**3 / clock.median("product"), 2 * 4 * block.numel() / clock.median("copy")


def show(clock: Clock, least: dict[str, float], found: Callable[[str], float]) -> None:
    """Print a line a part."""
    print("\n| part | s | floor s | of the floor |\n|---|---:|---:|---:|")
    for name, floor in least.items():
        print(f"| {name} | {found(name):.3f} | {floor:.3f} | {found(name) / floor:.1f}× |")


def planned(args: argparse.Namespace, config: PretrainedConfig, device: torch.device) -> int:
    """Return the peak of training by ``kdctl plan``, without the process itself and held-out states, in bytes."""
    settings = {
        "quantize.method": "minmax",
        "prompts.max_prompt_tokens": args.tokens // 4,
        "rollout.max_new_tokens": args.tokens - args.tokens // 4,
        "distill.max_tokens": args.tokens,
        "distill.micro_batch_size": args.sequences,
        "distill.gradient_accumulation": 1,
        "distill.lmbda": 0.0,
        "distill.train": args.train,
        "runtime.activation_checkpointing": args.activation_checkpointing,
    }
    preset = build_preset(load_preset("quickstart").model_dump(), settings, "step_parts")
    network = look_at(config, preset.quantize, torch.bfloat16, Objective())
    gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    phases = Cost(preset, network, device.type == "cpu", memory_bytes=gpu).phases()
    training = next(phase for phase in phases if phase.name == "training")
    left_out = sum(part.size_bytes for part in training.parts if part.name in ("process", "held-out states"))
    return training.peak_bytes - left_out


def main() -> None:
    """Time the parts and print them."""
    args = arguments()
    quiet()
    device = pick_device("auto")
    teacher = teacher_of(args, device)
    settings = DistillSection(
        train=args.train, steps=args.rounds, max_tokens=args.tokens, micro_batch_size=args.sequences, lmbda=0.0
    )
    grid = QuantizeSection(method="minmax", group_size=64)
    weights = quantize_layers(teacher, select_layers(teacher, grid), grid)
    student = build_student(teacher, weights)
    set_checkpointing(student, args.activation_checkpointing)
    data = rollouts(args.sequences, args.tokens, teacher.config.vocab_size)
    shadow = make_shadow(settings, student, weights, teacher)
    weights.clear()
    trainer = Trainer(teacher, student, shadow, Feed(settings, data), settings)
    batch, clock = collate(data).to(device), Clock(device)
    for _ in range(args.rounds):
        timed_step(trainer, batch, clock)
    for step in range(args.rounds):
        with clock.part("as trained"):
            trainer.step(step)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    measured = rates(device)
    print(f"{args.train}, {args.sequences} × {args.tokens} tokens, checkpointing {args.activation_checkpointing}")
    print(f"products {measured[0] / 1e9:.0f} GFLOP/s, copies {measured[1] / 1e9:.1f} GB/s")
    if device.type == "cuda":
        by_plan = f"{planned(args, teacher.config, device) / GIB:.1f} by kdctl plan"
        print(f"peak {peak / GIB:.1f} GiB, {by_plan}, on {torch.cuda.get_device_name()}")
    else:
        print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB:.2f} GiB resident")
    show(clock, floors(trainer, batch, measured), clock.median)
    share = sum(operations(trainer, batch).values()) / measured[0] / clock.median("as trained")
    print(f"\na step as it is trained, without waits between its parts: {clock.median('as trained'):.3f} s, ", end="")
    print(f"{share:.0%} of what matrix products reach here")


if __name__ == "__main__":
    main()
