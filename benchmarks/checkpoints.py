"""Measure how long training waits for a checkpoint, written at once or while training goes on, with made-up masters.

    python benchmarks/checkpoints.py [--millions 100] [--folder .] [--repeat 3]

Printed, of weights with AdamW's two moments in float32: the wait of the first save, which makes room for the copy, and
the median of those after it; the time until the checkpoint is on disk and hashed; how long products of matrices take
meanwhile against before; and the time to check and load it. Pages of the disk's cache are not dropped in between.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from kdctl.distill import checkpoint
from kdctl.distill.checkpoint import Checkpoints, checkpoint_bytes
from kdctl.distill.shadow import Shadow
from kdctl.quant.affine import QuantizedWeight
from kdctl.run.records import CheckpointMeta

ROWS, COLUMNS = 1000, 4000


class Masters(Shadow):
    """So many million numbers that are trained, and no student."""

    def __init__(self, millions: int):
        super().__init__(nn.Module(), {})
        count = max(1, millions * 10**6 // (ROWS * COLUMNS))
        self.trained = {f"{i}.master": nn.Parameter(torch.randn(ROWS, COLUMNS)) for i in range(count)}

    def receive(self, name: str, gradient: Tensor) -> None:
        """Take no gradient."""
        raise NotImplementedError

    def quantized_layer(self, name: str) -> QuantizedWeight:
        """Have no layer."""
        raise NotImplementedError


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=100, help="million numbers that are trained")
    parser.add_argument("--folder", type=Path, default=Path(), help="where checkpoints go, on the disk to be measured")
    parser.add_argument("--repeat", type=int, default=3, help="saves after the first")
    return parser.parse_args()


def seconds(work: Callable[[], object]) -> float:
    """Time a piece of work."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def product_seconds() -> float:
    """Time a product of matrices, the median of five."""
    a = torch.randn(1024, 1024)
    return median(seconds(lambda: a @ a) for _ in range(5))


def measure(root: Path, shadow: Shadow, optimizer: torch.optim.Optimizer, repeat: int) -> list[str]:
    """Save several times and load once; return the columns of a line."""
    waits, whole, meanwhile = [], [], []
    idle = product_seconds()
    with Checkpoints(root, shadow, optimizer) as checkpoints:
        for step in range(1, repeat + 2):
            started = time.perf_counter()
            meta = CheckpointMeta(identity="", step=step)
            waits.append(seconds(lambda meta=meta: checkpoints.save(meta, keep_last=1)))
            meanwhile.append(product_seconds())
            checkpoints.wait()
            whole.append(time.perf_counter() - started)
        loading = seconds(lambda: checkpoints.load(repeat + 1))
    found = [waits[0], median(waits[1:]), median(whole), median(meanwhile) / idle, loading]
    return [f"{each:.3f}" for each in found]


def main() -> None:
    """Measure both ways, one after the other."""
    args = arguments()
    shadow = Masters(args.millions)
    optimizer = torch.optim.AdamW(shadow.parameters())
    for parameter in shadow.parameters():
        moments = {"exp_avg": torch.randn_like(parameter), "exp_avg_sq": torch.rand_like(parameter)}
        optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    print(f"{checkpoint_bytes(shadow) / 2**30:.2f} GiB a checkpoint, {torch.get_num_threads()} threads\n")
    print("| training | waits s, first | waits s, later | on disk after s | product meanwhile × | load s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, spare in (("waits for the disk", 0), ("goes on", checkpoint_bytes(shadow))):
        checkpoint.spare_bytes = lambda processes, spare=spare: spare
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            print(f"| {name} | {' | '.join(measure(Path(folder), shadow, optimizer, args.repeat))} |", flush=True)


if __name__ == "__main__":
    main()
