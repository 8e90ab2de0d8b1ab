"""Open a store of a million made-up rollouts and take the first batch that training would draw from it.

    python benchmarks/store_scale.py [--rollouts 1000000] [--shards 100] [--batch 64] [--folder FOLDER]

Writes the store first, from Arrow arrays, where FOLDER does not hold it. Opening and drawing is done in a process of
its own. Printed, as JSON: seconds until the store is open (manifest read, every shard's hash compared), until the first
batch and the second are there, the processor time of all three, and the largest resident memory of that process with
all its libraries.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdctl.rollout.store import INTEGERS, NUMBERS, SCHEMA, RolloutStore
from kdctl.run.records import StoreManifest

SHORTEST, LONGEST, VOCABULARY = 10, 30, 49_152
"""Tokens of a prompt, and of a completion: 20 to 60 a rollout."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to keep the store; a temporary folder without it")
    parser.add_argument("--draw", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def made_up(first: int, rows: int) -> pa.Table:
    """Make rollouts of random tokens, with lengths spread evenly."""
    draw = np.random.default_rng(first)
    lengths = draw.integers(SHORTEST, LONGEST + 1, (2, rows))
    prompts, completions = (np.concatenate([[0], np.cumsum(each)]).astype(np.int32) for each in lengths)

    def tokens(offsets: np.ndarray) -> pa.Array:
        ids = draw.integers(0, VOCABULARY, offsets[-1], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, ids, type=INTEGERS)

    columns = {
        "prompt_id": [f"{first + i:016x}" for i in range(rows)],
        "prompt_index": np.arange(first, first + rows, dtype=np.int32),
        "sample_index": np.zeros(rows, np.int32),
        "prompt_ids": tokens(prompts),
        "completion_ids": tokens(completions),
        "logprobs": pa.ListArray.from_arrays(
            completions, -draw.exponential(size=completions[-1]).astype(np.float32), type=NUMBERS
        ),
        "finish_reason": ["stop"] * rows,
        "policy_step": np.zeros(rows, np.int32),
        "seed": np.zeros(rows, np.int64),
        "source": ["teacher"] * rows,
    }
    return pa.table(columns, schema=SCHEMA)


def write(store: RolloutStore, rollouts: int, shards: int) -> None:
    """Write a finished store."""
    bounds = np.linspace(0, rollouts, shards + 1).astype(int)
    parts = enumerate(pairwise(bounds))
    entries = [store.write_table(index, made_up(int(a), int(b - a)), "scale") for index, (a, b) in parts]
    store.finish(StoreManifest(source="teacher", identity="scale", writer="none", sampling=None, shards=tuple(entries)))


def draw(store: RolloutStore, batch: int) -> dict[str, float]:
    """Open a store, take two batches, and say how long it took."""
    from kdctl.config.preset import DistillSection
    from kdctl.distill.feed import Feed

    settings = DistillSection(lmbda=0.0, micro_batch_size=batch, gradient_accumulation=1)
    times, started = [time.perf_counter()], time.process_time()
    rollouts = store.read()
    times.append(time.perf_counter())
    for step in range(2):
        rows = Feed(settings, rollouts).rows(step)
        assert len(rows) == batch
        times.append(time.perf_counter())
    names = ("open_s", "first_batch_s", "second_batch_s")
    found = {name: round(b - a, 3) for name, (a, b) in zip(names, pairwise(times), strict=True)}
    found["cpu_s"] = round(time.process_time() - started, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rollouts": len(rollouts), **found, "peak_rss_gb": round(peak / 1e9, 3)}


def main() -> None:
    """Make the store where it is missing and measure a fresh process on it."""
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        store = RolloutStore(args.folder or Path(temporary) / "store")
        if args.draw:
            print(json.dumps(draw(store, args.batch)))
            return
        if not store.manifest_path.exists():
            write(store, args.rollouts, args.shards)
        again = [sys.executable, __file__, "--draw", "--folder", str(store.path), "--batch", str(args.batch)]
        subprocess.run(again, check=True)


if __name__ == "__main__":
    main()
