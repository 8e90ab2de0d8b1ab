"""Time kdctl's training step beside TRL's GKDTrainer: same model, data, batch and dtype, interleaved in one run.

    python benchmarks/versus_trl.py --peer-python PEER_VENV/bin/python [--data FILE.jsonl] [--out FILE.md]

The peer's environment: ``pip install torch transformers datasets accelerate trl torchao``. Without ``--data`` the
quickstart's teacher writes the completions that both train on. Each measurement is a process of its own and takes the
mean over all its steps, generation included; peak memory is that of the whole process, loading, measuring and saving
included. A third pair of rows has sequences of 128 and of 1,024 tokens: the slope is what one more token of a batch
costs. Where torch has no fast bf16 products, both sides have kdctl's. Tables have medians over rounds. Run it on an
idle machine: any other busy process distorts both sides.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from kdctl.config.resolve import load_preset
from kdctl.data.prompts import messages_of
from kdctl.eval import distribution
from kdctl.model.load import quiet
from kdctl.run.tracking import read_metrics
from kdctl.stages import pipeline
from kdctl.stages.context import Run, open_run
from kdctl.system import cpu_products

BATCH, MAX_TOKENS, NEW_TOKENS = 4, 256, 64
PROMPT_TOKENS = MAX_TOKENS - 32
SHORT, LONG, SLOPE_PROMPT = 128, 1024, 64
Settings = dict[str, object]


@dataclass
class Case:
    """One thing to time and what was measured of it. peer: the case that its ratios are taken to."""

    name: str
    command: list[str]
    metrics: Path | None = None
    peer: "Case | None" = None
    seconds: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)

    def run(self, folder: Path) -> None:
        """Run once, in ``folder``, and note the mean step and the peak resident memory."""
        os.sync()  # or what the run before it wrote would be written during this one
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            process = subprocess.Popen(self.command, cwd=folder, stdout=out, stderr=err)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{self.name} failed:\n{(folder / 'stderr').read_text()[-3000:]}")
        self.seconds.append(self._mean(folder))
        self.peak_gib.append(usage.ru_maxrss / 2**20)
        print(f"{self.name}: {self.seconds[-1]:.2f} s a step, {self.peak_gib[-1]:.2f} GiB", file=sys.stderr, flush=True)

    def _mean(self, folder: Path) -> float:
        if self.metrics is None:
            return json.loads((folder / "stdout").read_text().splitlines()[-1])["mean_s"]
        return statistics.fmean(line["time/step_s"] for line in read_metrics(self.metrics))

    def ratio(self, of: Callable[["Case"], list[float]]) -> str:
        """Divide a median by the peer's."""
        return f"{statistics.median(of(self)) / statistics.median(of(self.peer)):.2f}" if self.peer else "–"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="Python of the peer's environment; without it kdctl alone")
    parser.add_argument("--data", type=Path, help="JSON lines with messages that end with an answer")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="0: only memory per token")
    parser.add_argument("--slope-rounds", type=int, default=1, help="rounds of memory per token; 0: none")
    return parser.parse_args()


def prepare(folder: Path, data: Path | None) -> Run:
    """Make a run folder with the PTQ student and a small yardstick, and the data files that both sides read."""
    settings = {"heldout.num_prompts": 8, "heldout.min_completion_tokens": 1, "quantize.method": "minmax"}
    preset = load_preset("quickstart", settings)
    job = open_run(preset, folder / "run")
    pipeline.quantize(*job)
    rows = _fitting(job, data) if data else _teacher_written(job)
    _write(folder / "data.jsonl", rows)
    for tokens in (SHORT, LONG):
        _write(folder / f"{tokens}.jsonl", _filling(job, tokens))
    return job


def _write(path: Path, rows: Sequence[list[dict[str, str]]]) -> None:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def _fitting(job: Run, data: Path) -> list[list[dict[str, str]]]:
    """Take conversations whose prompt and answer both fit, so that neither side cuts the other's share."""
    kept, render = [], job.teacher.tokenizer().apply_chat_template
    for line in data.read_text().splitlines():
        messages = messages_of(json.loads(line))
        prompt, whole = (
            len(render(part, tokenize=True, add_generation_prompt=start)["input_ids"])
            for part, start in ((messages[:-1], True), (messages, False))
        )
        if prompt < PROMPT_TOKENS and 32 <= whole - prompt < MAX_TOKENS:
            kept.append(messages)
        if len(kept) == 200:
            return kept
    return kept


def _teacher_written(job: Run) -> list[list[dict[str, str]]]:
    """Let the teacher answer kdctl's prompts."""
    pipeline.rollout(*job, "teacher")
    decoded = pipeline.examples(*job, "teacher", 200)
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in decoded
    ]


def _filling(job: Run, tokens: int) -> list[list[dict[str, str]]]:
    """Make conversations that nearly fill sequences of ``tokens``; the peer refuses answers that leave no prompt."""
    ids = [token for document in distribution.text_documents(job.teacher.tokenizer(), 8192) for token in document]
    size = tokens - SLOPE_PROMPT
    texts = [str(job.teacher.tokenizer().decode(ids[i * size : (i + 1) * size])) for i in range(len(ids) // size)]
    return [[{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}] for text in texts * 8]


class Bench:
    """Describes the runs of both sides on one folder."""

    def __init__(self, job: Run, folder: Path, peer_python: Path | None, steps: int):
        self.job, self.folder, self.steps = job, folder, steps
        self.peer_python = peer_python.absolute() if peer_python else None

    def kdctl(self, name: str, variant: str, peer: Case | None, **settings: object) -> Case:
        """Describe a kdctl run; settings: distill fields, and any other as section__field."""
        sets: Settings = {
            "prompts.train": str(self.folder / "data.jsonl"),
            "prompts.max_prompt_tokens": PROMPT_TOKENS,
            "rollout.max_new_tokens": MAX_TOKENS,
            "rollout.num_prompts": 200,
            "distill.off_policy_source": "dataset",
            "distill.micro_batch_size": BATCH,
            "distill.max_tokens": MAX_TOKENS,
            "distill.steps": self.steps,
            "distill.heldout_every": 0,
            "distill.heldout_documents": 1,
            "distill.checkpoint_every": 0,
        }
        sets |= {key.replace("__", ".") if "__" in key else f"distill.{key}": value for key, value in settings.items()}
        flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "kdctl", "distill", "--run", str(self._run(variant, sets)), "--name", variant]
        return Case(
            name, [*command, "--force", *flags], self._run(variant, sets) / "distill" / variant / "metrics.jsonl", peer
        )

    def _run(self, variant: str, sets: Settings) -> Path:
        """Give other data or other completion lengths a run folder of their own, with the same student in it."""
        key = f"{sets['prompts.train']}{sets['prompts.max_prompt_tokens']}{sets['rollout.max_new_tokens']}"
        path = self.folder / f"run_{abs(hash(key))}"
        if not path.exists():
            shutil.copytree(self.job.context.paths.path, path)
            if sets["prompts.max_prompt_tokens"] != PROMPT_TOKENS:
                shutil.rmtree(path / "rollouts" / "heldout")  # its prompts are others
        return path

    def peer(self, lmbda: float, data: str = "data.jsonl", steps: int = 0, tokens: int = MAX_TOKENS) -> Case | None:
        """Describe a peer run."""
        if self.peer_python is None:
            return None
        options = {"model": self.job.teacher.folder(), "data": self.folder / data, "lmbda": lmbda, "beta": lmbda}
        options |= {"steps": steps or self.steps, "max-tokens": tokens, "products": cpu_products.__file__}
        flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        script = str(Path(__file__).with_name("peer_gkd.py").resolve())
        return Case(f"TRL λ={lmbda:g}, ≤ {tokens} tokens", [str(self.peer_python), script, *flags])

    def step_cases(self) -> list[Case]:
        """Describe everything whose step is timed; the replay comes after the run that it repeats."""
        off, on = self.peer(0), self.peer(1)
        live: Settings = {"lmbda": 1, "beta": 1, "rollout__max_new_tokens": NEW_TOKENS, "refresh_every": self.steps}
        kept: Settings = {"rollout__keep_states": "exact"}
        cases = [
            off,
            self.kdctl("λ=0, live teacher, `weights`", "weights", off),
            self.kdctl("λ=0, cached teacher states, `weights`", "cached", off, **kept),
            self.kdctl("λ=0, live teacher, `lora`", "lora", off, train="lora"),
            self.kdctl("λ=0, `weights`, all activations kept", "kept", off, runtime__activation_checkpointing="none"),
            on,
            self.kdctl("λ=1, a refresh every step", "live1", on, **live | {"refresh_every": 1}),
            self.kdctl(f"λ=1, a refresh every {self.steps} steps", "live", on, **live | kept),
            self.kdctl("λ=1, replay with cached states", "replay", on, **live | kept | {"replay": "live"}),
        ]
        return [case for case in cases if case is not None]

    def slope_cases(self) -> dict[str, tuple[Case, Case]]:
        """Describe short and long sequences on both sides, two steps each."""
        pairs = {}
        for name, settings in (
            ("kdctl `weights`", {}),
            ("kdctl `weights`, full", {"runtime__activation_checkpointing": "full"}),
        ):
            pairs[name] = tuple(
                self.kdctl(
                    f"{name}, {tokens} tokens",
                    "slope",
                    None,
                    steps=2,
                    prompts__train=str(self.folder / f"{tokens}.jsonl"),
                    prompts__max_prompt_tokens=SLOPE_PROMPT,
                    rollout__num_prompts=16,
                    rollout__max_new_tokens=tokens,
                    max_tokens=tokens,
                    **settings,
                )
                for tokens in (SHORT, LONG)
            )
        if self.peer_python:
            pairs["TRL"] = tuple(self.peer(0, f"{tokens}.jsonl", 2, tokens) for tokens in (SHORT, LONG))
        return pairs


def step_table(cases: Sequence[Case]) -> str:
    """Lay out medians over the rounds and ratios to the peer at the same λ."""
    lines = ["| | s a step | ratio | peak GiB | ratio |", "|---|---:|---:|---:|---:|"]
    for case in cases:
        step, peak = statistics.median(case.seconds), statistics.median(case.peak_gib)
        ratios = case.ratio(lambda c: c.seconds), case.ratio(lambda c: c.peak_gib)
        lines.append(f"| {case.name} | {step:.2f} | {ratios[0]} | {peak:.2f} | {ratios[1]} |")
    return "\n".join(lines) + "\n"


def slope_table(pairs: dict[str, tuple[Case, Case]]) -> str:
    """Lay out what one more token of a batch adds to peak memory."""
    lines = ["| | KiB a token | ratio |", "|---|---:|---:|"]
    slopes = {}
    for name, (short, long) in pairs.items():
        difference = statistics.median(long.peak_gib) - statistics.median(short.peak_gib)
        slopes[name] = difference * 2**20 / (BATCH * (LONG - SHORT))
    for name, slope in slopes.items():
        ratio = f"{slope / slopes['TRL']:.2f}" if "TRL" in slopes and name != "TRL" else "–"
        lines.append(f"| {name} | {slope:.0f} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cases, interleaved, and print the tables."""
    args = arguments()
    quiet()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(prepare(Path(name), args.data), Path(name), args.peer_python, args.steps)
        cases, pairs = bench.step_cases(), bench.slope_cases()
        for _ in range(args.rounds):
            for case in cases:
                case.run(bench.folder)
        for _ in range(args.slope_rounds):
            for case in [case for pair in pairs.values() for case in pair]:
                case.run(bench.folder)
    about = (
        f"{args.rounds} rounds of {args.steps} steps; torch {version('torch')}, transformers {version('transformers')}"
    )
    tables = [step_table(cases)] if args.rounds else []
    tables += [slope_table(pairs)] if args.slope_rounds else []
    tables = "\n".join([about + "\n", *tables])
    print(tables)
    if args.out:
        args.out.write_text(tables)


if __name__ == "__main__":
    main()
