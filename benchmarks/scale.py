"""Draw rows as training does from stores of ever more made-up rollouts, and say what a row costs.

    python benchmarks/scale.py [--rows 10000 100000 1000000 10000000] [--states 0] [--shard 10000] [--batch 64]
                               [--batches 200] [--folder FOLDER]

Rollouts are sparse text, 20 to 60 tokens. With ``--states H`` made-up states of H bfloat16 numbers a completion token
lie beside them, 40·H bytes a row, and are read too. A store is written where FOLDER does not hold it, and removed
unless FOLDER is named. Then processes of their own open it, the system's cache of its files emptied before: one that
knows nothing of it, as if it came from elsewhere, one that knows it, and two at once. Printed, as a Markdown table:

written: seconds to make it up and write it, with its states. hashed: seconds to open it where all shards must be
hashed. open: where they are known. states: seconds until those are found. first, a batch: milliseconds of the first
batch, and the median of those after it, files being read from the disk where the system has not yet kept them;
processor: of which this process worked. RSS: the largest memory of the process with Python and all libraries; files:
mapped pages in it at most, which processes share and the system takes back. alone, of two: memory after the last
batch, each shared page divided by the processes that have it: of one alone, and of each of two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from kdctl.rollout import shard as shards
from kdctl.rollout.store import RolloutStore
from kdctl.run.hashes import SETTLED_S
from kdctl.run.records import ShardEntry, StoreManifest

SHORTEST, LONGEST, VOCABULARY = 10, 30, 49_152
"""Tokens of a prompt, and of a completion: 20 to 60 a rollout."""
TEACHER = "made up"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--states", type=int, default=0, help="numbers of a state; 0: none are kept")
    parser.add_argument("--shard", type=int, default=10_000, help="rows of a shard")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where to keep stores; a temporary folder without it")
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def made_up(first: int, rows: int) -> Iterator[pa.RecordBatch]:
    """Make rollouts of random tokens, with lengths spread evenly, some at a time."""
    for start in range(first, first + rows, shards.TOGETHER):
        yield some_made_up(start, min(shards.TOGETHER, first + rows - start))


def some_made_up(first: int, rows: int) -> pa.RecordBatch:
    """Make one batch of them."""
    draw = np.random.default_rng(first)
    lengths = draw.integers(SHORTEST, LONGEST + 1, (2, rows))
    prompts, completions = (np.concatenate([[0], np.cumsum(each)]).astype(np.int32) for each in lengths)

    def tokens(offsets: np.ndarray) -> pa.Array:
        ids = draw.integers(0, VOCABULARY, offsets[-1], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, ids, type=shards.INTEGERS)

    logprobs = -draw.exponential(size=completions[-1]).astype(np.float32)
    columns = {
        "prompt_id": [f"{first + i:016x}" for i in range(rows)],
        "prompt_index": np.arange(first, first + rows, dtype=np.int32),
        "sample_index": np.zeros(rows, np.int32),
        "prompt_ids": tokens(prompts),
        "completion_ids": tokens(completions),
        "logprobs": pa.ListArray.from_arrays(completions, logprobs, type=shards.NUMBERS),
        "finish_reason": ["stop"] * rows,
        "policy_step": np.zeros(rows, np.int32),
        "seed": np.zeros(rows, np.int64),
        "source": ["teacher"] * rows,
    }
    return pa.record_batch(columns, schema=shards.SCHEMA)


def write(store: RolloutStore, rows: int, size: int, hidden: int) -> None:
    """Write a finished store, and states beside it."""
    bounds = enumerate(pairwise([*range(0, rows, size), rows]))
    entries = [shards.write(store.shard_path(index), made_up(a, b - a), "scale") for index, (a, b) in bounds]
    for entry in entries if hidden else ():
        write_states(store.path / entry.file, entry, hidden)
    store.finish(StoreManifest(source="teacher", identity="scale", writer="none", sampling=None, shards=tuple(entries)))


def write_states(shard: Path, entry: ShardEntry, hidden: int) -> None:
    """Write states whose first number is the place of their token in the shard."""
    import torch
    from safetensors.torch import save_file

    from kdctl.rollout.teacher_states import MADE_OF, content_hash, states_path

    states = torch.zeros(entry.completion_tokens, hidden, dtype=torch.bfloat16)
    states[:, 0] = torch.arange(entry.completion_tokens)
    said = {"shard": entry.sha256, "teacher": TEACHER, "kind": "exact", "sha256": content_hash({"states": states})}
    save_file({"states": states}, states_path(shard), {MADE_OF: json.dumps(said)})


def memory(kind: str, name: str = "status") -> float:
    """Return a line of what the system says of this process's memory, in megabytes."""
    lines = Path("/proc/self", name).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{kind}:"))


def draw(store: RolloutStore, size: int, batches: int, hidden: int) -> dict[str, float]:
    """Open a store and take batches as training does; say what that took."""
    import torch

    from kdctl.base.progress import Silent
    from kdctl.config.preset import DistillSection
    from kdctl.distill.feed import Feed
    from kdctl.rollout.teacher_states import TeacherStates

    started = time.perf_counter()
    rollouts = store.read()
    found = {"open": time.perf_counter() - started}
    started, states = time.perf_counter(), TeacherStates(TEACHER)
    if hidden:
        nobody = SimpleNamespace(config=SimpleNamespace(hidden_size=hidden), dtype=torch.bfloat16)
        states.fill(store, nobody, Silent())  # pyright: ignore[reportArgumentType] - all states are there
    found["states"] = time.perf_counter() - started
    feed = Feed(DistillSection(lmbda=0.0, micro_batch_size=size, gradient_accumulation=1), rollouts)
    times, busy, files = [], [], 0.0
    for step in range(batches):
        started, worked = time.perf_counter(), time.process_time()
        rows = feed.rows(step)
        if hidden:
            counts = [len(row.completion_ids) for row in rows]
            assert states.of(rows, counts).shape == (sum(counts), hidden)
        times.append(1000 * (time.perf_counter() - started))
        busy.append(1000 * (time.process_time() - worked))
        files = max(files, memory("RssFile"))
    found |= {"first": times[0], "batch": statistics.median(times[1:]), "busy": statistics.median(busy[1:])}
    return found | {"rss": memory("VmHWM"), "files": files}


def child(args: argparse.Namespace) -> None:
    """Draw, and say at the parent's word what it took."""
    found = draw(RolloutStore(args.draw), args.batch, args.batches, args.states)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(found | {"share": memory("Pss", "smaps_rollup")}), flush=True)
    sys.stdin.readline()


def forget(folder: Path) -> None:
    """Have the system drop the pages of a folder's files."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def answer(one: "subprocess.Popen[str]") -> str:
    """Read a line that a child has printed."""
    assert one.stdout is not None
    return one.stdout.readline()


def drawn(args: argparse.Namespace, store: RolloutStore, cache: Path, count: int = 1) -> list[dict[str, float]]:
    """Let processes draw at once, and return what each says."""
    forget(store.path)
    asked = {"--states": args.states, "--batch": args.batch, "--batches": args.batches, "--draw": store.path}
    command = [sys.executable, __file__, *(str(word) for pair in asked.items() for word in pair)]
    told = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    children = [subprocess.Popen(command, env={**os.environ, "KDCTL_CACHE": str(cache)}, **told) for _ in range(count)]
    lines = []
    for _ in range(2):  # all are ready before one is asked, and all have said it before one ends
        lines = [answer(one) for one in children]
        for one in children:
            print(file=one.stdin, flush=True)
    for one in children:
        if one.wait() != 0:
            raise SystemExit(f"a process that drew ended with code {one.returncode}")
    return [json.loads(line) for line in lines]


def measured(args: argparse.Namespace, rows: int, folder: Path, cache: Path) -> list[str]:
    """Write a store where it is missing, draw from it, and return a line of the table."""
    store, written = RolloutStore(folder), "-"
    if not store.finished:
        started = time.perf_counter()
        write(store, rows, args.shard, args.states)
        written = f"{time.perf_counter() - started:.0f}"
        time.sleep(SETTLED_S)
    disk = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    (new,), (known,), pair = (drawn(args, store, cache, count) for count in (1, 1, 2))
    times = [f"{new['open']:.2f}", f"{known['open']:.2f}", f"{known['states']:.2f}"]
    rest = [known[name] for name in ("first", "batch", "busy", "rss", "files", "share")]
    return [f"{rows:,}", f"{disk:.2f}", written, *times, *(f"{one:.0f}" for one in [*rest, pair[0]["share"]])]


def main() -> None:
    """Measure stores of growing size."""
    args = arguments()
    if args.draw:
        child(args)
        return
    columns = [
        "rows",
        "disk GB",
        "written s",
        "hashed s",
        "open s",
        "states s",
        "first ms",
        "a batch ms",
        "processor ms",
    ]
    columns += ["RSS MB", "files MB", "alone MB", "of two MB"]
    print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}", flush=True)
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.folder or Path(temporary)) / f"rows-{rows}"
            os.environ["KDCTL_CACHE"] = str(Path(temporary) / "written")
            print(f"| {' | '.join(measured(args, rows, folder, Path(temporary) / 'cache'))} |", flush=True)


if __name__ == "__main__":
    main()
