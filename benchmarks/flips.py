"""What the codes that training changed win, and what they cost, of each variant of a run folder.

    python benchmarks/flips.py runs/study_kl [--variant NAME ...] [--draws 3]

Weights of ``--train weights`` change code by code. Held-out KL is measured of the PTQ student, the variant, the student
with all changes turned round, and students with each change turned round or not at random. To second order the change
in KL of a set of flips δ is g·δ + ½·Σᵢ hᵢᵢ·δᵢ² + ½·Σᵢ≠ⱼ hᵢⱼ·δᵢ·δⱼ, and signs tell the parts apart:

    won       −g·δ, what the gradient promises: half of what turning all of them round costs more
    alone     ½·Σ hᵢᵢ·δᵢ², what each flip costs by itself, whatever its direction: what random signs leave
    together  the rest: what flips in common directions cost beyond that

At the best length of a step in one direction "together" is half of what was won beyond "alone". Also printed is half of
the changes, drawn at random, beside what the three parts say of it. All are shares of the PTQ student's KL, in percent,
with 95 % intervals over documents.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kdctl import stats
from kdctl.base.progress import Silent
from kdctl.config.preset import Preset
from kdctl.formats.student import Student, load_student
from kdctl.quant.affine import dequantize
from kdctl.run.documents import Array
from kdctl.run.measures import FORWARD_KL
from kdctl.run.paths import VariantDir
from kdctl.run.record_files import read_record
from kdctl.run.records import DistillReport, Estimate
from kdctl.stages.context import open_run
from kdctl.stages.yardstick import Measuring, ensure_measuring

Chosen = Callable[[Tensor], Tensor]
"""Given a layer's changes of code, returns those of another student."""


def main() -> None:
    """Measure every variant asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--variant", action="append", default=[])
    parser.add_argument("--draws", type=int, default=3, help="students with random signs")
    given = parser.parse_args()
    run = open_run(read_record(given.run / "preset.json", Preset), given.run, reporter=Silent())
    measuring, paths = ensure_measuring(*run), run.context.paths
    student = load_student(paths.student, run.teacher.device)
    start = _kl(measuring, student)
    print("| variant | codes changed | removed | won | alone | together | half, at random | and by the parts |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for variant in paths.variants():
        if not given.variant or variant.name in given.variant:
            print(_row(measuring, student, start, variant, given.draws), flush=True)


def _row(measuring: Measuring, student: Student, start: Array, variant: VariantDir, draws: int) -> str:
    """Measure one variant; the student that is given ends as it began."""
    trained = load_student(variant.final, measuring.teacher.device).weights
    if any(not torch.equal(trained[n].qparams.scale, w.qparams.scale) for n, w in student.weights.items()):
        sys.exit(f"{variant.name} has scales of its own: its change is more than flips")
    if read_record(variant.report, DistillReport).settings.get("train_norms"):
        sys.exit(f"{variant.name} has norms of its own: its change is more than flips")
    changes = {name: trained[name].codes.short() - w.codes.short() for name, w in student.weights.items()}
    drawn = torch.Generator().manual_seed(0)

    def of(choose: Chosen) -> Array:
        for name, weight in student.weights.items():
            codes = (weight.codes.short() + choose(changes[name])).clamp(0, weight.grid.max_code).to(torch.uint8)
            parameter = student.model.get_parameter(f"{name}.weight")
            parameter.data.copy_(dequantize(codes, weight.qparams, weight.grid))
        return _kl(measuring, student)

    def signs(change: Tensor) -> Tensor:
        return change * torch.randint(0, 2, change.shape, generator=drawn, dtype=torch.int16).mul_(2).sub_(1)

    after, turned = of(lambda change: change), of(torch.neg)
    alone = sum(of(signs) for _ in range(draws)) / draws - start
    half = of(lambda change: change * torch.randint(0, 2, change.shape, generator=drawn, dtype=torch.int16))
    of(torch.zeros_like)
    won, together = (turned - after) / 2, (turned + after) / 2 - start - alone
    parts = (start - after, won, alone, together, start - half, won / 2 - alone / 2 - together / 4)
    changed = sum(int((change != 0).sum()) for change in changes.values())
    share = 100 * changed / sum(change.numel() for change in changes.values())
    cells = (variant.name, f"{share:.3f} %", *(_percent(stats.ratio(part, start)) for part in parts))
    return f"| {' | '.join(cells)} |"


def _kl(measuring: Measuring, student: Student) -> Array:
    """Return the sums of KL over each held-out document."""
    return measuring.measure(student.model, "student")[FORWARD_KL]


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


if __name__ == "__main__":
    main()
