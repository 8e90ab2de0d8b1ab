"""Measure what keeping the teacher's final hidden states as 8-bit integers changes, on held-out completions.

    python benchmarks/teacher_states.py runs/quickstart [--documents 64]

Printed, per completion token: KL between the teacher and the distribution that its rounded states give, how often the
likeliest token stays, and a student's KL to either, which is the loss that training would see.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from kdctl.config.preset import Preset
from kdctl.eval.distribution import Yardstick, compare
from kdctl.formats.student import load_student
from kdctl.model.load import quiet
from kdctl.rollout.teacher_states import from_int8, int8
from kdctl.run.measures import AGREEMENT, FORWARD_KL, REVERSE_KL
from kdctl.run.paths import RunDir
from kdctl.run.record_files import read_record
from kdctl.stages.context import open_run
from kdctl.stages.yardstick import ensure_measuring


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with a student")
    parser.add_argument("--documents", type=int, default=64)
    return parser.parse_args()


def rounded(yardstick: Yardstick) -> Yardstick:
    """Return a yardstick whose states went through 8 bits."""
    states = [from_int8(int8(states)).to(states.dtype) for states in yardstick.states]
    return replace(yardstick, states=states)


def main() -> None:
    """Compare the teacher with its rounded states, and a student with both."""
    args = arguments()
    quiet()
    job = open_run(read_record(RunDir(args.run).preset, Preset), args.run)
    exact = ensure_measuring(*job).yardstick(args.documents)
    coarse, student = rounded(exact), load_student(job.context.paths.student, job.teacher.device).model
    teacher = compare(job.teacher.load(), coarse)
    found = {name: compare(student, each) for name, each in (("exact", exact), ("int8", coarse))}
    sizes = {"exact": exact.states[0][:1].nbytes, "int8": sum(t.nbytes for t in int8(exact.states[0][:1]).values())}
    print(f"{int(teacher.tokens.sum())} completion tokens of {len(teacher.tokens)} documents\n")
    print("| states | bytes a token | KL(teacher‖states) | top-1 | KL(states‖student) | KL(student‖states) |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, own, same in (
        ("exact", 0.0, 1.0),
        ("int8", teacher.mean(REVERSE_KL), teacher.mean(AGREEMENT)),
    ):
        to, back = found[name].mean(FORWARD_KL), found[name].mean(REVERSE_KL)
        print(f"| {name} | {sizes[name]:,} | {own:.6f} | {100 * same:.2f} % | {to:.4f} | {back:.4f} |")


if __name__ == "__main__":
    main()
