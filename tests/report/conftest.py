"""A made-up study that fills every figure: λ and β crossed, learning rates, seeds, and what students wrote."""

import json
from pathlib import Path

import pytest
from made_up import answers, distribution, evaluated, make_run, wrote_rollouts

from kdctl.report.columns import Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.study_reader import read_study
from kdctl.run.paths import RunDir

TASKS = ("alpha", "beta")
VARIANTS = {
    f"lambda{lmbda:g}_beta{beta:g}_lr{lr:g}_seed{seed}": {"lmbda": lmbda, "beta": beta, "lr": lr, "seed": seed}
    for lmbda, beta, lr, seed in (
        *((lmbda, beta, 2e-5, 0) for lmbda in (0.0, 0.5, 1.0) for beta in (0.0, 1.0)),
        (0.0, 0.0, 2e-5, 1),
        (0.0, 0.0, 1e-4, 0),
        (1.0, 1.0, 1e-4, 0),
    )
}


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Make the run folder, which no test may change."""
    drawn = enumerate(VARIANTS.items())
    variants = {
        name: settings | {"steps": 4, "share": 0.62 + 0.02 * index, "draw": index, "kl": 0.3 - 0.02 * index}
        for index, (name, settings) in drawn
    }
    run = make_run(tmp_path_factory.mktemp("full") / "full", variants, TASKS)
    ptq, own, plain = {task: answers(0.6, 1) for task in TASKS}, distribution(0.5), distribution(0.25)
    evaluated(run, "ptq", ptq, kl=0.4, student_written=own, ptq_written=own, text_distribution=plain)
    for name, settings in VARIANTS.items():
        held_out = {"step": 4, "train/forward_kl": 0.2, "eval/forward_kl": 0.21}
        with open(run.variant(name).metrics, "a") as file:
            file.write(json.dumps(held_out) + "\n")
        if settings["lmbda"] > 0:
            wrote_rollouts(run.variant(name).rollouts, 64)
    return run


@pytest.fixture(scope="session")
def full(full_run: RunDir) -> Results:
    """Compare what can be compared in it."""
    return Results(read_study([full_run]), Contrasts(0.005))


@pytest.fixture
def bare(tmp_path: Path) -> Results:
    """Compare a teacher and a PTQ student, evaluated on nothing but held-out documents."""
    return Results(read_study([make_run(tmp_path / "bare", {}, [])]), Contrasts(0.005))
