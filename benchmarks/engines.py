"""Completions in process beside servers': tokens a second, the same distribution or not, and what a gap tells.

    python benchmarks/engines.py RUN --server 'vllm=PYTHON -m vllm.entrypoints.openai.api_server --model {weights} …'

RUN is a run folder with its student. Each ``--server`` is a name and a command with {weights} and {port}, as
``rollout.serve`` takes it. Every engine completes the same prompts with the student at temperature 1, in turn; a server
is started before its turn and ended after it. Intervals are 95 %, over prompts, of the difference to the engine in
process, which itself is drawn twice. The second table compares a server's log-probabilities of fixed tokens with those
computed here: of the student that it holds, of one with 0.1 % other codes, of the teacher, after temperature, and
behind a doubled first token.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kdctl.base.progress import Silent
from kdctl.config.preset import RolloutSection
from kdctl.config.resolve import build_preset
from kdctl.formats.student import load_student
from kdctl.model.load import quiet
from kdctl.quant.affine import dequantize
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.server.child import Child
from kdctl.rollout.server.gap import gap, slope
from kdctl.rollout.server.pool import Pool
from kdctl.rollout.server.rules import log_probabilities, read
from kdctl.rollout.server.writer import Writer
from kdctl.run.records import Rollout
from kdctl.stages.context import open_run
from kdctl.stages.rollout import train_prompts
from kdctl.stages.served import StudentFiles
from kdctl.system.memory import give_back


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--server", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--weights", choices=["packed", "dense", "gguf"], action="append", default=[], help="one each")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


class Bench:
    """A student, its teacher and the prompts to complete."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        base = open_run(str(args.run / "preset.json"), args.run)
        changes = {"rollout.num_prompts": args.prompts}
        self.context, self.teacher = open_run(
            build_preset(base.context.preset.model_dump(), changes, "bench"), args.run
        )
        self.student = load_student(self.context.paths.student, self.teacher.device)
        prompts = train_prompts(self.context, self.teacher).prompts[: args.prompts]
        self.items = [(prompt, 0) for prompt in prompts]
        self.stop = self.teacher.stop_ids()

    def sampling(self, seed: int, **changes) -> Sampling:
        """Draw from the model itself."""
        return replace(Sampling(1.0, 1.0, 0, self.args.tokens, 0, seed), **changes)

    def in_process(self, seed: int) -> tuple[float, list[Rollout]]:
        """Time kdctl's own engine."""
        engine = InProcess(self.student.model, self.stop, "student", len(self.items))
        started = time.perf_counter()
        found = engine.complete(self.items, self.sampling(seed))
        return time.perf_counter() - started, found

    def stale(self) -> torch.nn.Module:
        """Return the student as it was some training steps ago: one code in a thousand another."""
        moved = load_student(self.context.paths.student, self.teacher.device)
        generator = torch.Generator().manual_seed(0)
        for name, weight in moved.weights.items():
            flips = torch.rand(weight.codes.shape, generator=generator) < 1e-3
            codes = torch.where(flips, weight.codes.clamp(max=weight.grid.max_code - 1) + 1, weight.codes)
            parameter = moved.model.get_parameter(f"{name}.weight")
            parameter.data.copy_(dequantize(codes.to(weight.codes.dtype), weight.qparams, weight.grid))
        return moved.model


def mean_of(rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
    """Return what is compared of each completion."""
    return {
        "log-probability a token": np.array([np.mean(one.logprobs or [0.0]) for one in rollouts]),
        "tokens": np.array([float(len(one.completion_ids)) for one in rollouts]),
        "ended": np.array([float(one.finish_reason == "stop") for one in rollouts]),
    }


def difference(found: Sequence[Rollout], own: Sequence[Rollout]) -> str:
    """Compare an engine's completions with those in process, paired by prompt and seed."""
    cells = []
    for name, values in mean_of(found).items():
        moved = values - mean_of(own)[name]
        half = 1.96 * moved.std(ddof=1) / np.sqrt(len(moved))
        cells.append(f"{values.mean():.3f} ({moved.mean():+.3f} ± {half:.3f})")
    return " | ".join(cells)


def gaps(bench: Bench, writer: Writer, name: str) -> list[str]:
    """Measure a server against the right weights and against wrong ones."""
    (place,) = writer.pool.places
    fixed = [one for one in writer.draw(bench.items[:8], bench.sampling(9), -1) if one.completion_ids]
    there = torch.tensor(writer.score(fixed, place))
    here = log_probabilities(bench.student.model, fixed)
    stale = log_probabilities(bench.stale(), fixed)  # pyright: ignore[reportArgumentType]
    warm = [one for one in writer.draw(bench.items[:8], bench.sampling(9, temperature=0.7), -1) if one.completion_ids]
    stated = torch.tensor([value for one in warm for value in one.logprobs or []])
    doubled = [replace(one, prompt_ids=[one.prompt_ids[0], *one.prompt_ids]) for one in fixed]
    behind, shifted = torch.tensor(writer.score(doubled, place)), log_probabilities(bench.student.model, doubled)
    after = read(bench.student.model, warm, bench.sampling(9, temperature=0.7), [])
    rows = {
        "the student that it holds": gap(there, here, stale),
        "a student of 0.1 % other codes": gap(there, stale, here),
        "the teacher": gap(there, log_probabilities(bench.teacher.load(), fixed)),
        "what it states at temperature 0.7": gap(stated, after.plain),
        "the same after temperature": gap(after.asked, after.plain),
        "with a doubled first token": replace(gap(behind, here), slope=slope(behind, shifted, here)),
        "without one, as if with": replace(gap(there, here), slope=slope(there, shifted, here)),
    }
    bench.teacher.forget()
    return [
        f"| {name} | {what} | {one.mean:.3f} | {one.largest:.2f} | {'' if one.slope is None else f'{one.slope:.2f}'} |"
        for what, one in rows.items()
    ]


def serve(bench: Bench, name: str, command: str, form: str | None, own: Sequence[Rollout]) -> tuple[str, list[str]]:
    """Start a server, time it, compare what it drew and measure its gaps."""
    settings = RolloutSection(engine="server", serve=command)
    with tempfile.TemporaryDirectory() as scratch:
        files = StudentFiles(bench.context, Path(scratch))
        child = Child(command, files.log, Silent())
        try:
            started = time.perf_counter()
            url = child.start(files.start(form or child.form))  # pyright: ignore
            up = time.perf_counter() - started
            pool = Pool([url], len(bench.items), settings.timeout_s, print)
            (place,) = pool.meet()
            vocabulary = bench.student.model.config.get_text_config().vocab_size
            writer = Writer(pool, bench.stop, vocabulary, "student", "bench")
            writer.find_stops(bench.items[0][0].prompt_ids)
            writer.draw(bench.items[:4], bench.sampling(99), 0)  # warm up
            seconds, found = [], []
            for seed in range(bench.args.rounds):
                started = time.perf_counter()
                found.append(writer.draw(bench.items, bench.sampling(seed), 0))
                seconds.append(time.perf_counter() - started)
            rate = rate_of(seconds, found)
            row = f"| {name} {place.about.version} | {rate:.0f} | {up:.0f} | {difference(found[0], own)} |"
            return row, gaps(bench, writer, name)
        finally:
            child.stop()


def rate_of(seconds: Sequence[float], found: Sequence[Sequence[Rollout]]) -> float:
    """Return the median of tokens a second."""
    tokens = [sum(len(one.completion_ids) for one in each) for each in found]
    return statistics.median(count / second for count, second in zip(tokens, seconds, strict=True))


def main() -> None:
    """Time every engine in turn and print both tables."""
    args = arguments()
    quiet()
    bench = Bench(args)
    own = [bench.in_process(seed) for seed in range(max(2, args.rounds))]
    rate = rate_of([seconds for seconds, _ in own], [found for _, found in own])
    rows = [f"| in process | {rate:.0f} | | {difference(own[1][1], own[0][1])} |"]
    tables = []
    for number, text in enumerate(args.server):
        name, _, command = text.partition("=")
        form = args.weights[number] if number < len(args.weights) else None
        row, found = serve(bench, name, command, form, own[0][1])
        rows.append(row)
        tables += found
        give_back()
    print(
        f"{len(bench.items)} prompts, {args.tokens} new tokens at most, {args.rounds} rounds, medians; differences are"
    )
    print("to the first draw in process\n")
    print("| engine | tokens/s | s to start | log-probability a token | tokens a completion | share that ends |")
    print("|---|---:|---:|---:|---:|---:|")
    print("\n".join(rows))
    print("\n| server | its log-probabilities against those of | mean gap | largest | slope |")
    print("|---|---|---:|---:|---:|")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
