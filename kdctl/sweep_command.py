"""``kdctl sweep``: read the file, check all of it, then run it here, through wandb or on Kubernetes."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdctl import console, resolve, views
from kdctl.command import (
    DEFAULT_PRESET,
    JsonOption,
    PresetOption,
    SetOption,
    VerboseOption,
    guarded,
    prepare_libraries,
    show,
)
from kdctl.errors import PresetError

if TYPE_CHECKING:
    from kdctl.sweep.board import Board
    from kdctl.sweep.space import Sweep

DEFAULT_SWEEP = "quickstart_grid"


@dataclass(frozen=True)
class Request:
    """The options that decide what a sweep is, wherever it runs."""

    file: str
    preset: str | None
    settings: tuple[str, ...]
    max_trials: int | None
    evaluate: bool
    verbose: bool

    def command(self, folder: str) -> list[str]:
        """Return the arguments of kdctl that mean the same sweep in another process."""
        words = ["sweep", self.file, "--run", folder]
        words += ["--preset", self.preset] if self.preset else []
        words += [word for setting in self.settings for word in ("--set", setting)]
        words += ["--max-trials", str(self.max_trials)] if self.max_trials else []
        words += [] if self.evaluate else ["--no-eval"]
        return words + (["--verbose"] if self.verbose else [])

    def base(self, found: "Sweep", folder: Path) -> str:
        """Name the preset that trials start from: --preset, the file's, the folder's own, or the default."""
        own = folder / "preset.json"
        return self.preset or found.preset or (str(own) if own.is_file() else DEFAULT_PRESET)


def sweep(
    file: Annotated[str, typer.Argument(help="Name of a shipped sweep, or a wandb sweep file.")] = DEFAULT_SWEEP,
    values: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Run only the one trial with these values.")
    ] = None,
    preset: PresetOption = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="Run folder. (default: runs/<sweep name>)", file_okay=False)
    ] = None,
    settings: SetOption = None,
    jobs: Annotated[int, typer.Option(help="Trials at once, each in a process of its own.", min=1)] = 1,
    shard: Annotated[str | None, typer.Option(help="i/N: only trials i, i + N, ..., counted from 0.")] = None,
    max_trials: Annotated[
        int | None, typer.Option(help="Largest grid; number of random or bayes trials. (default: 64)", min=1)
    ] = None,
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Evaluate variants, or only train them.")] = True,
    as_json: JsonOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials and stop.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Train and evaluate many variants in one run folder, as a wandb sweep file says.

    Example: kdctl sweep lr_onpolicy --dry-run
    """
    with guarded():
        from kdctl.sweep.space import read_sweep

        found = read_sweep(file)
        folder = run or Path("runs") / found.name
        request = Request(file, preset, tuple(settings or ()), max_trials, evaluate, verbose)
        if values:
            run_one(request, found, folder, values)
            return
        board = planned(request, found, folder)
        if dry_run:
            show_plan(board)
            return
        run_here(request, board, jobs, shard)
        show(board.report(board.study()), as_json, views.show_sweep)


def planned(request: Request, found: "Sweep", folder: Path) -> "Board":
    """Lay out the sweep and check all of it."""
    from kdctl.sweep.board import Board
    from kdctl.sweep.plan import plan_sweep

    overrides = resolve.parse_assignments(request.settings)
    plan = plan_sweep(found, request.base(found, folder), overrides, request.max_trials, request.evaluate)
    return Board(plan, folder)


def show_plan(board: "Board") -> None:
    """Print the trials that would run."""
    from kdctl.sweep.board import preview

    views.show_trials(preview(board.plan))


def run_here(request: Request, board: "Board", jobs: int, shard: str | None) -> None:
    """Run the sweep, or a shard of it, in this process or in ``jobs`` of them."""
    from kdctl.sweep.plan import Shard, parse_shard

    part = parse_shard(shard) if shard else Shard()
    jobs = min(jobs, board.plan.total)
    if jobs > 1:
        if shard:
            raise PresetError(f"--shard {shard} is one process of several and --jobs {jobs} starts several; give one")
        run_jobs(request, board, jobs)
        return
    prepare_libraries(board.plan.preset.runtime.offline, request.verbose)
    reporter = console.ConsoleReporter()
    from kdctl import models
    from kdctl.sweep.local import run_shard

    if not request.verbose:
        models.quiet()
    with watched(board, reporter, jobs):
        run_shard(board, part, reporter)


def run_jobs(request: Request, board: "Board", jobs: int) -> None:
    """Run the sweep's shards side by side, each a kdctl of its own."""
    from kdctl.sweep.locks import only_sweep
    from kdctl.sweep.workers import run_workers

    board.run.prepare()
    words = request.command(str(board.run.path))
    commands = [[sys.executable, "-m", "kdctl", *words, "--shard", f"{index}/{jobs}"] for index in range(jobs)]
    with only_sweep(board.locks, board.plan.sweep.name), watched(board, console.ConsoleReporter(), jobs):
        run_workers(commands, board.folder)


@contextmanager
def watched(board: "Board", reporter: console.ConsoleReporter, jobs: int) -> Iterator[None]:
    """Show a live table of the sweep while a block runs."""
    board.run.prepare()
    study = board.study()
    with reporter.live(lambda: views.draw_sweep(board.report(study), jobs)):
        yield


def run_one(request: Request, found: "Sweep", folder: Path, assignments: Sequence[str]) -> None:
    """Run one trial with values from the command line, as a wandb agent does."""
    from kdctl.sweep.board import Board
    from kdctl.sweep.plan import base_plan, parse_trial

    overrides = resolve.parse_assignments(request.settings)
    plan = base_plan(found, request.base(found, folder), overrides, request.evaluate)
    values = parse_trial(found, assignments)
    plan.trial_preset(values)
    prepare_libraries(plan.preset.runtime.offline, request.verbose)
    from kdctl import models
    from kdctl.sweep.local import LocalSweep

    if not request.verbose:
        models.quiet()
    board = Board(plan, folder)
    board.run.prepare()
    one = LocalSweep(board, console.ConsoleReporter())
    value = one.run_trial(values)
    console.show_pairs(plan.variant(values, one.base), [(found.metric.name, f"{value:.6g}")])
