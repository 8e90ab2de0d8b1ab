"""Time kdctl's training step beside TRL's GKDTrainer: same model, data, batch and dtype, interleaved in one run.

    python benchmarks/versus_trl.py --peer-python PEER_VENV/bin/python [--data FILE.jsonl]

The peer's environment: ``pip install torch transformers datasets accelerate trl torchao``. Without ``--data`` the
quickstart's teacher writes the completions that both train on. Each measurement is a process of its own and takes the
mean over all its steps, generation included; the table has medians over rounds. Run it on an idle machine: any other
busy process distorts both sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from kdctl import models, pipeline
from kdctl.job import Job, open_job
from kdctl.prompts import messages_of
from kdctl.resolve import load_preset
from kdctl.tracking import read_metrics

BATCH, MAX_TOKENS, NEW_TOKENS = 4, 256, 64


@dataclass
class Case:
    """One thing to time and what was measured of it."""

    name: str
    command: list[str]
    metrics: Path | None = None
    seconds: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)

    def run(self, folder: Path) -> None:
        """Run once, in ``folder``, and note the mean step and the peak resident memory."""
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            process = subprocess.Popen(self.command, cwd=folder, stdout=out, stderr=err)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{self.name} failed:\n{(folder / 'stderr').read_text()[-3000:]}")
        self.seconds.append(self._mean(folder))
        self.peak_gib.append(usage.ru_maxrss / 2**20)

    def _mean(self, folder: Path) -> float:
        if self.metrics is None:
            return json.loads((folder / "stdout").read_text().splitlines()[-1])["mean_s"]
        return statistics.fmean(line["time/step_s"] for line in read_metrics(self.metrics))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="Python of the peer's environment; without it kdctl alone")
    parser.add_argument("--data", type=Path, help="JSON lines with messages that end with an answer")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lmbda", type=float, nargs="+", default=[0, 1])
    return parser.parse_args()


def prepare(folder: Path, data: Path | None) -> Job:
    """Make a run folder with the PTQ student and a small yardstick, and the data file that both sides read."""
    preset = load_preset("quickstart", {"heldout.num_prompts": 8, "heldout.min_completion_tokens": 1})
    job = open_job(preset, folder / "run")
    pipeline.quantize(job)
    rows = _fitting(job, data) if data else _teacher_written(job)
    (folder / "data.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return job


def _fitting(job: Job, data: Path) -> list[list[dict[str, str]]]:
    """Take conversations whose prompt and answer both fit, so that neither side cuts the other's share."""
    kept = []
    for line in data.read_text().splitlines():
        messages = messages_of(json.loads(line))
        prompt, whole = (
            len(job.tokenizer.apply_chat_template(part, tokenize=True, add_generation_prompt=start)["input_ids"])
            for part, start in ((messages[:-1], True), (messages, False))
        )
        if prompt < MAX_TOKENS - 32 and 32 <= whole - prompt < MAX_TOKENS:
            kept.append(messages)
        if len(kept) == 200:
            return kept
    return kept


def _teacher_written(job: Job) -> list[list[dict[str, str]]]:
    """Let the teacher answer kdctl's prompts."""
    pipeline.rollout(job, "teacher")
    decoded = pipeline.examples(job, "teacher", 200)
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in decoded
    ]


def kdctl_case(job: Job, folder: Path, steps: int, lmbda: float, refresh: int) -> Case:
    """Describe a kdctl run."""
    name = f"kdctl λ={lmbda:g}" + (f" refresh {refresh}" if lmbda else "")
    sets = {
        "prompts.train": str(folder / "data.jsonl"),
        "prompts.max_prompt_tokens": MAX_TOKENS - 32,
        "rollout.max_new_tokens": MAX_TOKENS if not lmbda else NEW_TOKENS,
        "rollout.num_prompts": 200,
        "distill.off_policy_source": "dataset",
        "distill.micro_batch_size": BATCH,
        "distill.max_tokens": MAX_TOKENS,
        "distill.steps": steps,
        "distill.lmbda": lmbda,
        "distill.beta": lmbda,
        "distill.refresh_every": refresh,
        "distill.heldout_every": 0,
        "distill.heldout_documents": 1,
        "distill.checkpoint_every": 0,
    }
    flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    variant = f"bench{lmbda:g}_{refresh}"
    command = [sys.executable, "-m", "kdctl", "distill", "--run", str(job.run.path), "--name", variant, "--force"]
    return Case(name, command + flags, job.run.variant(variant).metrics)


def peer_case(job: Job, folder: Path, python: Path, steps: int, lmbda: float) -> Case:
    """Describe a peer run."""
    options = {"model": job.folder, "data": folder / "data.jsonl", "lmbda": lmbda, "beta": lmbda, "steps": steps}
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return Case(f"TRL λ={lmbda:g}", [str(python), str(Path(__file__).with_name("peer_gkd.py").resolve()), *flags])


def show(cases: list[Case]) -> None:
    """Print medians over the rounds and ratios to the peer at the same λ."""
    print("\n| system | s a step | ratio | peak GiB | ratio |\n|---|---:|---:|---:|---:|")
    for case in cases:
        peer = next((c for c in cases if c.name == f"TRL λ={case.name.split('=')[1][0]}"), None)
        step, peak = statistics.median(case.seconds), statistics.median(case.peak_gib)
        ratios = [
            f"{value / statistics.median(other):.2f}" if peer else "–"
            for value, other in ((step, peer.seconds if peer else [1]), (peak, peer.peak_gib if peer else [1]))
        ]
        print(f"| {case.name} | {step:.2f} | {ratios[0]} | {peak:.2f} | {ratios[1]} |")


def main() -> None:
    """Run all cases, interleaved, and print the table."""
    args = arguments()
    models.quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = prepare(folder, args.data)
        kinds = [(lmbda, refresh) for lmbda in args.lmbda for refresh in ((1, args.steps) if lmbda else (1,))]
        cases = [kdctl_case(job, folder, args.steps, lmbda, refresh) for lmbda, refresh in kinds]
        if args.peer_python:
            cases += [peer_case(job, folder, args.peer_python.absolute(), args.steps, lmbda) for lmbda in args.lmbda]
        for index in range(args.rounds):
            for case in cases:
                case.run(folder)
                print(f"round {index + 1}: {case.name} {case.seconds[-1]:.2f} s a step", file=sys.stderr)
        show(cases)


if __name__ == "__main__":
    main()
