"""Draw the KL to the teacher against the minutes that it took: kdctl's methods and other tools, in one run.

    python benchmarks/quality.py WORK [--method kl ...] [--steps 12 ...] [--peer llm-compressor-gptq=PYTHON ...]

Every model is made from the quickstart's teacher (``--teacher`` names another folder) with the same calibration
sequences and judged by ``kdctl eval --also`` in one run folder: on the held-out completions and on plain text.
``--method kl-352`` calibrates on so many. ``--steps`` trains the student of the last ``--method`` for so many, its
seconds added to those of quantizing. A peer's Python is that of an environment with the tool alone
(benchmarks/peer_quantizers.py has the methods). Seconds are those of quantizing and training, without rollouts, loading
and saving. All that is complete in WORK is kept, so a run that was killed goes on. Run it on an idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from kdctl.config.resolve import load_preset
from kdctl.model.reference import model_folder
from kdctl.rollout.store import RolloutStore
from kdctl.run.record_files import read_record
from kdctl.run.records import DistillReport, Estimate, EvalResult, QuantizeReport

PRESET = "quickstart"
HERE = Path(__file__).parent
INSTANT = 6
"""Seconds that anything quicker is drawn at."""
JUDGED = ["-s", "eval.limit=1", "-s", 'eval.tasks=["arc_easy_offline"]']


@dataclass(frozen=True)
class Made:
    """A student that some method made."""

    name: str
    folder: Path
    seconds: float


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--teacher", type=Path, help="another teacher's folder; benchmarks/folded_teacher.py makes one")
    parser.add_argument("--prompts", type=int, default=256, help="the teacher's rollouts")
    parser.add_argument("--method", action="append", default=[], help="a method of kdctl quantize; repeatable")
    parser.add_argument("--steps", action="append", default=[], type=int, help="train so many steps; repeatable")
    parser.add_argument("--peer", action="append", default=[], metavar="METHOD=PYTHON", help="another tool")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    given = parser.parse_args()
    if bad := [peer for peer in given.peer if not all(peer.partition("="))]:
        parser.error(f"--peer wants METHOD=PYTHON, not {', '.join(bad)}")
    if given.steps and not given.method:
        parser.error("--steps trains the student of the last --method; there is none")
    if few := [one for one in given.method if int(one.partition("-")[2] or 0) > given.prompts]:
        parser.error(f"{', '.join(few)} would calibrate on more than the --prompts {given.prompts}")
    return given


def kdctl(*arguments: str | Path) -> None:
    """Run a command of kdctl; end where it fails."""
    command = [sys.executable, "-m", "kdctl", *map(str, arguments)]
    print("$ kdctl", *arguments, file=sys.stderr, flush=True)
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"failed: {' '.join(map(str, arguments))}")


class Bench:
    """One working folder: ``base`` judges, every method has a run folder or a folder of its own beside it."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.work, self.base = given, given.work.absolute(), given.work.absolute() / "base"
        self.teacher = given.teacher.absolute() if given.teacher else teacher_folder()
        grid = {"quantize.bits": given.bits, "quantize.group_size": given.group_size}
        asked = {**grid, "teacher.model": self.teacher, "rollout.num_prompts": given.prompts}
        self.asked = [part for name, value in asked.items() for part in ("-s", f"{name}={value}")]
        self.base.mkdir(parents=True, exist_ok=True)
        kdctl("rollout", "-p", PRESET, "-r", self.base, *self.asked, "-s", "quantize.method=minmax", *JUDGED)
        kdctl("quantize", "-r", self.base)

    def own(self, method: str) -> Made:
        """Quantize by a method of kdctl, in a run folder that shares the base's rollouts."""
        run = self.work / method
        if not run.exists():
            run.mkdir()
            (run / "rollouts").symlink_to(self.base / "rollouts", target_is_directory=True)
        kind, _, sequences = method.partition("-")
        fitted = ["-s", f"quantize.calibration_sequences={sequences}"] if sequences else []
        kdctl("quantize", "-p", PRESET, "-r", run, *self.asked, "-s", f"quantize.method={kind}", *fitted)
        seconds = read_record(run / "student" / "quantize.json", QuantizeReport).seconds_s
        return Made(method, run / "student", seconds)

    def trained(self, start: Made, steps: int) -> Made:
        """Train a method's student."""
        run, name = start.folder.parent, f"{start.name}-and-{steps}-steps"
        kdctl("distill", "-r", run, "--name", name, "-s", f"distill.steps={steps}")
        seconds = read_record(run / "distill" / name / "distill.json", DistillReport).train_seconds_s
        return Made(name, run / "distill" / name / "final", start.seconds + seconds)

    def peer(self, method: str, python: str) -> Made:
        """Quantize by another tool."""
        out, said = self.work / method, self.work / f"{method}.json"
        if not said.exists():
            calibration = self.work / "calibration.json"
            rows = RolloutStore(self.base / "rollouts" / "teacher").read()
            calibration.write_text(json.dumps([row.prompt_ids + row.completion_ids for row in rows]))
            grid = ["--bits", str(self.given.bits), "--group-size", str(self.given.group_size)]
            command = [python, HERE / "peer_quantizers.py", method, self.teacher, calibration, out, *grid]
            print(f"{method} …", file=sys.stderr, flush=True)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            if done.returncode:
                sys.exit(f"{method} failed")
            said.write_text(done.stdout.strip().splitlines()[-1])
        return Made(method, out, json.loads(said.read_text())["seconds"])

    def judge(self, made: Made) -> EvalResult:
        """Measure a student's distance to the teacher, as of a model made elsewhere."""
        kdctl("eval", "ptq", "--also", made.folder, "--as", made.name, "-r", self.base)
        return read_record(self.base / "eval" / made.name / "results.json", EvalResult)


def teacher_folder() -> Path:
    """Return the folder of the quickstart's teacher."""
    import torch

    return model_folder(load_preset(PRESET).teacher.model, torch.bfloat16)


def interval(found: Estimate | None) -> str:
    """Write a value and its 95 % interval."""
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]" if found else "–"


def main() -> None:
    """Make, judge, print the table and draw the figure."""
    given = arguments()
    bench = Bench(given)
    own = [bench.own(method) for method in given.method]
    trained = [bench.trained(own[-1], steps) for steps in given.steps] if own else []
    made = [*own, *trained, *(bench.peer(*peer.split("=", 1)) for peer in given.peer)]
    found = {one.name: (one, bench.judge(one)) for one in sorted(made, key=lambda one: one.seconds)}
    lines = ["| method | minutes | KL, held-out completions | KL, plain text |", "|---|---:|---:|---:|"]
    for one, result in found.values():
        text = result.text_distribution.forward_kl if result.text_distribution else None
        kl = interval(result.distribution.forward_kl)
        lines.append(f"| {one.name} | {one.seconds / 60:.1f} | {kl} | {interval(text)} |")
    table = "\n".join(lines) + "\n"
    (bench.work / "quality.md").write_text(table)
    print(table)
    draw(found, [peer.partition("=")[0] for peer in given.peer], bench.work / "quality.svg")


def draw(found: dict[str, tuple[Made, EvalResult]], peers: Collection[str], path: Path) -> None:
    """Draw the figure: every model a point with its name, other tools' in another colour."""
    figure, axis = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for one, result in found.values():
        kl, minutes = result.distribution.forward_kl, max(one.seconds, INSTANT) / 60
        color = "#8c8c8c" if one.name in peers else "#b34700"
        spread = [[kl.value - kl.low], [kl.high - kl.value]]
        axis.errorbar(minutes, kl.value, spread, fmt="o", capsize=3, color=color)
        label = axis.annotate(
            one.name, (minutes, kl.value), (8, 3), textcoords="offset points", fontsize=8, color=color
        )
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axis.set(xlabel="minutes", ylabel="KL to the teacher, nats a token", xscale="log", yscale="log")
    axis.set_xlim(right=axis.get_xlim()[1] * 4)  # room for the last name
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
