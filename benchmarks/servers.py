"""What several servers add up to, what one that is killed costs, what a refresh costs, and what rollout.lag gains.

    python benchmarks/servers.py RUN --server 'llama-server --model {weights} --port {port} -t 1 …' [--weights gguf]

RUN is a run folder with its student. The command is one as ``rollout.serve`` takes it; it is started on one processor
of its own, once and then twice at a time, and completes the same prompts. One of the two is killed in the middle. Then
the student is trained live on one such server, this process on the other processor, with ``rollout.lag`` 0 and 1: the
seconds of a refresh, of generation that training waited for, and of all steps.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from kdctl.base.progress import Silent
from kdctl.model.load import quiet
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.server.child import Child
from kdctl.rollout.server.pool import Pool
from kdctl.rollout.server.writer import Writer
from kdctl.run.tracking import read_metrics
from kdctl.stages.context import open_run
from kdctl.stages.rollout import train_prompts
from kdctl.stages.served import StudentFiles


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--server", required=True, metavar="COMMAND")
    parser.add_argument("--weights", choices=["packed", "dense", "gguf"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    return parser.parse_args()


def pinned(command: str, processor: int) -> str:
    """Have a command run on one processor."""
    return f"taskset -c {processor} {command}"


def started(stack: ExitStack, args: argparse.Namespace, weights: Path, processor: int, scratch: Path) -> str:
    """Start a server on a processor; return its address."""
    child = Child(pinned(args.server, processor), scratch / f"{processor}.log", Silent())
    stack.callback(child.stop)
    return child.start(weights)


def tokens_per_second(writer: Writer, items: Sequence, args: argparse.Namespace) -> float:
    """Return the median of some rounds."""
    found = []
    for seed in range(args.rounds):
        began = time.perf_counter()
        drawn = writer.draw(items, Sampling(1.0, 1.0, 0, args.tokens, 0, seed), 0)
        found.append(sum(len(one.completion_ids) for one in drawn) / (time.perf_counter() - began))
    return statistics.median(found)


def added_up(args: argparse.Namespace) -> None:
    """Compare one server with two, and kill one of them in the middle."""
    context, teacher = open_run(str(args.run / "preset.json"), args.run)
    prompts = train_prompts(context, teacher).prompts[: args.prompts]
    items = [(prompt, 0) for prompt in prompts]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = StudentFiles(context, scratch)
        form = args.weights or Child(args.server, files.log, Silent()).form
        weights = files.start(form)
        urls = [started(stack, args, weights, processor, scratch) for processor in (0, 1)]

        def writer(chosen: Sequence[str]) -> Writer:
            pool = Pool(chosen, 16, 600.0, print)
            pool.meet()
            vocabulary = teacher.config().get_text_config(decoder=True).vocab_size
            made = Writer(pool, teacher.stop_ids(), vocabulary, "student", "bench")
            made.find_stops(items[0][0].prompt_ids)
            made.draw(items[:4], Sampling(1.0, 1.0, 0, 8, 0, 99), 0)  # warm up
            return made

        alone = tokens_per_second(writer(urls[:1]), items, args)
        both = tokens_per_second(writer(urls), items, args)
        print(f"one server on one processor {alone:.1f} tokens/s, two on two {both:.1f}: {both / alone:.2f} times")
        last = writer(urls)
        seconds = len(items) * args.tokens / both / 2
        threading.Timer(seconds, lambda: kill_listener(urls[1])).start()
        found = last.draw(items, Sampling(1.0, 1.0, 0, args.tokens, 0, 7), 0)
        print(f"one killed after {seconds:.0f} s: {len(found)} of {len(items)} completions came")


def kill_listener(url: str) -> None:
    """Kill the process that listens on a port."""
    port = f"{int(url.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port}") and row[3] == "0A"}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if inodes & {os.readlink(path) for path in (process / "fd").iterdir()}:
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def lagged(args: argparse.Namespace) -> None:
    """Train live on a server that has a processor of its own, without lag and with."""
    for lag in (0, 1):
        name = f"bench-lag{lag}"
        settings = {
            "distill.lmbda": 1.0,
            "distill.steps": args.steps,
            "distill.refresh_every": 2,
            "rollout.max_new_tokens": args.tokens,
            "rollout.lag": lag,
            "rollout.weights": args.weights,
        }
        said = [word for key, value in settings.items() if value is not None for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "kdctl", "distill", "--run", str(args.run), "--name", name, "--force", *said]
        command += ["--engine", "server", "--serve", pinned(args.server, 1)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["taskset", "-c", "0", *command], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        lines = read_metrics(args.run / "distill" / name / "metrics.jsonl")[2:]  # the first interval has nothing before
        found = {
            "lag": lag,
            "steps": len(lines),
            "generation waited for, s": round(sum(line["time/generate_s"] for line in lines), 1),
            "all steps, s": round(sum(line["time/step_s"] for line in lines), 1),
            "a refresh, s": round(statistics.median(line.get("rollout/refresh_s", 0.0) for line in lines), 1),
        }
        print(json.dumps(found))


def main() -> None:
    """Print all of it."""
    args = arguments()
    quiet()
    added_up(args)
    lagged(args)


if __name__ == "__main__":
    main()
