"""What asking by the teacher's margins saves, drawn anew many times from models that answered everything.

    python benchmarks/allocation.py runs/study_kl
    python benchmarks/allocation.py RUN --near 0.3 --far 0.05 --draws 500

Of every pair of models of a run folder (evaluated with eval.allocation=all) printed are the difference of their average
scores, what it is on average over new draws of what is asked, the share of documents that are asked, the interval's
width over that of the full evaluation, and how many full evaluations' forwards equal precision costs: share × width².
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdctl import stats
from kdctl.config.preset import EvalSection
from kdctl.eval.allocation import allocate
from kdctl.run.documents import item_values
from kdctl.run.measures import ITEM_MEASURES
from kdctl.run.paths import RunDir
from kdctl.run.record_files import read_record
from kdctl.run.records import Estimate, EvalResult
from kdctl.stats import Repeated

Tables = dict[str, pa.Table]


def main() -> None:
    """Compare every pair of models, fully and by draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--near", type=float, default=EvalSection().near)
    parser.add_argument("--far", type=float, default=EvalSection().far)
    parser.add_argument("--draws", type=int, default=200)
    given = parser.parse_args()
    run = RunDir(given.run)
    results = {path.parent.name: read_record(path, EvalResult) for path in run.evaluated()}
    metrics = {task: score.metric for task, score in results["teacher"].tasks.items()}
    kept = {
        task: metric
        for task, metric in metrics.items()
        if "loglikelihoods" in _table(run, "teacher", task).column_names
    }
    tables = {name: {task: _table(run, name, task) for task in kept} for name in results}
    tried = [EvalSection(allocation="margin", near=given.near, far=given.far, seed=seed) for seed in range(given.draws)]
    print(f"{'models':<60} {'full':>8} {'drawn':>8} {'asked':>6} {'width':>6} {'cost':>6}")
    for first, second in itertools.combinations(sorted(results), 2):
        full = _difference(tables[first], tables[second], kept)
        drawn, widths, asked = [], [], 0.0
        for settings in tried:
            some = [_asked(tables["teacher"], tables[name], kept, settings, name) for name in (first, second)]
            found = _difference(some[0], some[1], kept)
            drawn.append(found.value)
            widths.append((found.high - found.low) / (full.high - full.low))
            weights = [
                table["weight"].to_numpy() for one in some for table in one.values() if "weight" in table.column_names
            ]
            asked = float(np.mean(np.concatenate(weights) > 0))
        width = float(np.mean(widths))
        line = f"{full.value:8.4f} {np.mean(drawn):8.4f} {asked:6.2f} {width:6.2f} {asked * width**2:6.2f}"
        print(f"{first[:29]:<30}{second[:29]:<30} {line}")


def _table(run: RunDir, name: str, task: str) -> pa.Table:
    return pq.read_table(run.samples(name, task)).sort_by("item_id")


def _asked(teacher: Tables, own: Tables, metrics: dict[str, str], settings: EvalSection, name: str) -> Tables:
    """Return a model's tables as if only some documents had been asked; the teacher answers all."""
    if name == "teacher":
        return own
    found = {task: allocate(teacher[task], metric, settings) for task, metric in metrics.items()}
    return {task: one.noted(own[task]) for task, one in found.items() if one is not None}


def _difference(first: Tables, second: Tables, metrics: dict[str, str]) -> Estimate:
    """Compare two models on the average of tasks."""
    pairs = {}
    for task, metric in metrics.items():
        values = [item_values(tables[task], ITEM_MEASURES[metric]).astype(float) for tables in (first, second)]
        pairs[task] = Repeated([values[0]], [values[1]])
    return stats.compare_seeds_average(pairs).difference


if __name__ == "__main__":
    main()
