"""Time bfloat16 products on this CPU: torch's own kernels, kdctl's widened ones, and float32, interleaved.

    python benchmarks/products.py [--tokens 1024 --rounds 5]

kdctl widens products only on CPUs without instructions for them; here they are timed on any. The layer is the widest of
SmolLM2-135M, the attention one decoder layer's over sequences of 256 tokens. Run it on an idle machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from kdctl.system import cpu_products

HIDDEN, INNER, HEADS, KEY_HEADS, WIDTH, LENGTH = 576, 1536, 9, 3, 64, 256


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def works(tokens: int) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Describe what is timed: a function and its float32 inputs."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    keys = [numbers(max(1, tokens // LENGTH), KEY_HEADS, LENGTH, WIDTH) for _ in range(2)]
    return {
        f"linear layer, {tokens} tokens": (linear, [numbers(tokens, HIDDEN), numbers(INNER, HIDDEN)]),
        "linear layer, 4 tokens": (linear, [numbers(4, HIDDEN), numbers(INNER, HIDDEN)]),
        f"attention, {tokens} tokens": (attention, [numbers(len(keys[0]), HEADS, LENGTH, WIDTH), *keys]),
    }


def forward(work: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Do it once, for its result alone."""
    with torch.no_grad():
        work(*inputs)


def both(work: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Do it once with its backward pass."""
    work(*(tensor.requires_grad_() for tensor in inputs)).sum().backward()


def seconds(run: Callable[[], None], kind: str) -> float:
    """Time one run with the kernels that a kind names, after one that is not timed."""
    library = cpu_products.register(frozenset([torch.bfloat16])) if kind == "widened" else None
    try:
        run()
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    finally:
        if library is not None:
            library._destroy()


def main() -> None:
    """Time all kinds in turn and print medians."""
    args = arguments()
    able = "no" if torch.bfloat16 in cpu_products.slow_dtypes() else "yes"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; bfloat16 instructions: {able}")
    print("\n| ms | torch | widened | float32 | torch / widened |\n|---|---:|---:|---:|---:|")
    for name, (work, wide) in works(args.tokens).items():
        for label, do in (("forward", forward), ("and backward", both)):
            narrow = [tensor.bfloat16() for tensor in wide]
            times: dict[str, list[float]] = {"torch": [], "widened": [], "float32": []}
            for _ in range(args.rounds):
                for kind, taken in times.items():
                    inputs = [tensor.detach().clone() for tensor in (wide if kind == "float32" else narrow)]
                    taken.append(1e3 * seconds(lambda: do(work, inputs), kind))  # noqa: B023
            own, ours, full = map(statistics.median, times.values())
            print(f"| {name}, {label} | {own:.2f} | {ours:.2f} | {full:.2f} | {own / ours:.1f} |")


if __name__ == "__main__":
    main()
