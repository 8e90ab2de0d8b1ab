"""``kdctl sweep``: read the file, check all of it, then run it here, through wandb or on Kubernetes."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kdctl.base.errors import PresetError
from kdctl.cli import console
from kdctl.cli import render as views
from kdctl.cli.fields import options
from kdctl.cli.options import (
    DEFAULT_PRESET,
    JsonOption,
    PresetOption,
    SetOption,
    VerboseOption,
    from_default,
    guarded,
    prepare_libraries,
    process_count,
    show,
    show_json,
)
from kdctl.config import resolve
from kdctl.config.preset import Preset

if TYPE_CHECKING:
    from kdctl.sweep.board import Board
    from kdctl.sweep.plan import SweepPlan, Values
    from kdctl.sweep.records import TrialRecord
    from kdctl.sweep.space import Sweep

DEFAULT_SWEEP = "quickstart_grid"
Backend = Literal["local", "wandb", "kubernetes"]
ALLOWED: dict[Backend, tuple[str, ...]] = {
    "local": ("--jobs", "--shard"),
    "wandb": ("--agents", "--sweep-id"),
    "kubernetes": ("--agents", "--sweep-id", "--pod", "--apply"),
}
"""Options that mean something only with some backends."""


@dataclass(frozen=True)
class Request:
    """The options that decide what a sweep is, wherever it runs."""

    file: Annotated[str, typer.Argument(help="Name of a shipped sweep, or a wandb sweep file.")] = DEFAULT_SWEEP
    preset: PresetOption = None
    settings: SetOption = None
    max_trials: Annotated[
        int | None, typer.Option(help="Largest grid; number of random or bayes trials. (default: 64)", min=1)
    ] = None
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Evaluate variants, or only train them.")] = True
    verbose: VerboseOption = False

    def command(self, folder: str) -> list[str]:
        """Return the arguments of kdctl that mean the same sweep in another process."""
        words = ["sweep", self.file, "--run", folder]
        words += ["--preset", self.preset] if self.preset else []
        words += [word for setting in self.settings or () for word in ("--set", setting)]
        words += ["--max-trials", str(self.max_trials)] if self.max_trials else []
        words += [] if self.evaluate else ["--no-eval"]
        return words + (["--verbose"] if self.verbose else [])

    def base(self, found: "Sweep", folder: Path) -> str:
        """Name the preset that trials start from: --preset, the file's, the folder's own, or the default."""
        own = folder / "preset.json"
        return self.preset or found.preset or (str(own) if own.is_file() else DEFAULT_PRESET)


@dataclass(frozen=True)
class Where:
    """The options that decide where trials run."""

    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="Run folder. (default: runs/<sweep name>)", file_okay=False)
    ] = None
    backend: Annotated[Backend, typer.Option(help="Where trials run: here, wandb agents here, or pods.")] = "local"
    jobs: Annotated[int, typer.Option(help="Trials at once, each in a process of its own.", min=1)] = 1
    shard: Annotated[str | None, typer.Option(help="i/N: only trials i, i + N, ..., counted from 0.")] = None
    agents: Annotated[int, typer.Option(help="wandb agents, or pods. 0: only create the wandb sweep.", min=0)] = 1
    sweep_id: Annotated[
        str | None, typer.Option(help="wandb sweep that exists: agents or pods join it, instead of a new one.")
    ] = None
    pod: Annotated[
        list[str] | None,
        typer.Option(help="image=, gpus=, cpus=, memory=, grace=, claim= or secret= of a pod. Repeatable."),
    ] = None
    apply: Annotated[bool, typer.Option("--apply", help="Hand the manifests to kubectl; else print them.")] = False

    def check(self) -> None:
        """Raise PresetError for options that mean nothing where the trials will run, or with several processes."""
        if process_count() > 1:
            raise PresetError(
                f"{process_count()} processes were launched, and a sweep divides trials, not one trial; start it as "
                "one process, with --jobs for several trials at once"
            )
        if self.shard:
            from kdctl.sweep.plan import parse_shard

            parse_shard(self.shard)
        allowed = ALLOWED[self.backend]
        given = {"jobs": self.jobs > 1, "agents": self.agents != 1}
        for name in ("jobs", "shard", "agents", "sweep_id", "pod", "apply"):
            option = "--" + name.replace("_", "-")
            if given.get(name, vars(self)[name]) and option not in allowed:
                raise PresetError(
                    f"{option} means nothing with --backend {self.backend}, which takes {', '.join(allowed)}"
                )


@options()
def sweep(
    request: Request,
    values: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Run only the one trial with these values.")
    ] = None,
    as_json: JsonOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials and stop.")] = False,
    *,
    where: Where,
) -> None:
    """Train and evaluate many variants in one run folder, as a wandb sweep file says.

    Example: kdctl sweep lr_onpolicy --dry-run
    """
    with guarded(divided=True):
        from kdctl.sweep.space import read_sweep

        where.check()
        found = read_sweep(request.file)
        folder = where.run or Path("runs") / found.name
        if values:
            plan_one(request, found, folder, values, as_json) if dry_run else run_one(request, found, folder, values)
        elif dry_run:
            show_plan(planned(request, found, folder), as_json)
        elif where.backend == "wandb":
            run_agents(request, found, folder, where)
        elif where.backend == "kubernetes":
            run_pods(request, found, folder, where)
        else:
            board = planned(request, found, folder)
            run_here(request, board, where.jobs, where.shard)
            show(board.report(board.journal()), as_json, views.show_sweep)


def planned(request: Request, found: "Sweep", folder: Path) -> "Board":
    """Lay out the sweep and check all of it."""
    from kdctl.sweep.board import Board
    from kdctl.sweep.plan import plan_sweep

    overrides = resolve.parse_assignments(request.settings or [])
    plan = plan_sweep(found, request.base(found, folder), overrides, request.max_trials, request.evaluate)
    return Board(plan, folder)


def show_plan(board: "Board", as_json: bool) -> None:
    """Print the trials that would run."""
    from kdctl.sweep.board import preview

    print_trials(preview(board.plan), as_json)


def print_trials(trials: "Sequence[TrialRecord]", as_json: bool) -> None:
    """Print trials as JSON, by number, or for people."""
    if as_json:
        show_json({str(trial.number): trial for trial in trials})
    else:
        views.show_trials(trials)


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
    from kdctl.sweep.local import run_shard

    with watched(board, reporter):
        if news := from_default(request.preset or board.plan.sweep.preset, board.run.path):
            reporter.note(news)
        run_shard(board, part, reporter)


def run_jobs(request: Request, board: "Board", jobs: int) -> None:
    """Run the sweep's shards side by side, each a kdctl of its own."""
    from kdctl.sweep.locks import only_sweep
    from kdctl.sweep.workers import run_workers

    board.run.prepare()
    words = request.command(str(board.run.path))
    commands = [[sys.executable, "-P", "-m", "kdctl", *words, "--shard", f"{index}/{jobs}"] for index in range(jobs)]
    with only_sweep(board.locks, board.plan.sweep.name), watched(board, console.ConsoleReporter()):
        run_workers(commands, board.folder)


@contextmanager
def watched(board: "Board", reporter: console.ConsoleReporter) -> Iterator[None]:
    """Show a live table of the sweep while a block runs."""
    board.run.prepare()
    journal = board.journal()
    with reporter.live(lambda: views.draw_sweep(board.report(journal))):
        yield


def one_trial(request: Request, found: "Sweep", folder: Path, assignments: Sequence[str]) -> "tuple[SweepPlan, Values]":
    """Read the values of one trial from the command line. Raises PresetError for what cannot be trained."""
    from kdctl.sweep.plan import base_plan, parse_trial

    overrides = resolve.parse_assignments(request.settings or [])
    plan = base_plan(found, request.base(found, folder), overrides, request.evaluate)
    values = parse_trial(found, assignments)
    plan.trial_preset(values)
    return plan, values


def plan_one(request: Request, found: "Sweep", folder: Path, assignments: Sequence[str], as_json: bool) -> None:
    """Print the one trial that would run."""
    from kdctl.sweep.records import TrialRecord

    plan, values = one_trial(request, found, folder, assignments)
    name = plan.variant(values, plan.preset)
    print_trials([TrialRecord(number=0, values=values, status="waiting", variant=name)], as_json)


def run_one(request: Request, found: "Sweep", folder: Path, assignments: Sequence[str]) -> None:
    """Run one trial with values from the command line, as a wandb agent does."""
    from kdctl.sweep.board import Board

    plan, values = one_trial(request, found, folder, assignments)
    prepare_libraries(plan.preset.runtime.offline, request.verbose)
    from kdctl.sweep.local import LocalSweep

    board = Board(plan, folder)
    board.run.prepare()
    one = LocalSweep(board, console.ConsoleReporter())
    value = one.run_trial(values)
    console.show_pairs(plan.variant(values, one.base), [(found.metric.name, f"{value:.6g}")])


def run_agents(request: Request, found: "Sweep", folder: Path, where: Where) -> None:
    """Create a wandb sweep, unless one is named, and run agents of it until it is done."""
    from kdctl.run import tracking
    from kdctl.sweep.board import Board
    from kdctl.sweep.plan import base_plan, grid_trials
    from kdctl.sweep.wandb_config import wandb_config
    from kdctl.sweep.workers import run_workers

    overrides = resolve.parse_assignments(request.settings or [])
    plan = base_plan(found, request.base(found, folder), overrides, request.evaluate)
    if found.method == "grid":
        grid_trials(found, request.max_trials)
    board = Board(plan, folder)
    board.run.prepare()
    words = request.command(str(folder)) + logging_on(plan.preset)
    config = wandb_config(plan, words, request.max_trials)
    name = where.sweep_id or tracking.create_sweep(config, plan.preset.tracking)
    console.show_text(f"wandb agent {name}")
    if where.agents:
        run_workers([[sys.executable, "-P", "-m", "wandb", "agent", name]] * where.agents, board.folder)


def logging_on(preset: Preset) -> list[str]:
    """Return the option that makes trials log to wandb, unless they do."""
    return ["--set", "tracking.wandb=online"] if preset.tracking.wandb == "off" else []


def run_pods(request: Request, found: "Sweep", folder: Path, where: Where) -> None:
    """Print the manifests of a Job, or hand them to kubectl. Its pods are shards, or agents of a wandb sweep."""
    from kdctl.sweep import kubernetes as k8s

    if where.agents < 1:
        raise PresetError("--agents 0 is for --backend wandb; a Job needs at least one pod")
    pod, pods = k8s.parse_pod(where.pod or ()), where.agents
    if where.sweep_id:
        command = k8s.agent_command(where.sweep_id)
    else:
        place = k8s.pod_folder(PurePosixPath(folder))
        pods = min(pods, planned(request, found, folder).plan.total)
        command = k8s.shard_command(request.command(place), pods)
    text = k8s.render(k8s.Fleet(found.name, command, pods, own_files(request, found)), pod)
    console.show_text(k8s.apply(text) if where.apply else text)


def own_files(request: Request, found: "Sweep") -> dict[str, str]:
    """Return what a sweep's command reads and no installation has: sweep file and preset. Raises PresetError."""
    from kdctl.sweep.space import sweep_names

    names = [] if request.file in sweep_names() else [request.file]
    preset = request.preset or found.preset
    if preset is not None and preset not in resolve.preset_names():
        resolve.read_tree(preset)
        names.append(preset)
    return {name: Path(name).read_text(encoding="utf-8") for name in names}
