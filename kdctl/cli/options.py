"""What every command has in common: options, finding the preset and the run folder, errors as messages."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from pydantic import BaseModel

from kdctl.base.errors import PresetError
from kdctl.base.progress import Silent
from kdctl.base.stopping import held
from kdctl.base.strict_json import write_json
from kdctl.base.sums import SumError
from kdctl.cli import boundary, console
from kdctl.cli.edited import edited_settings
from kdctl.cli.fields import Flags
from kdctl.config import resolve
from kdctl.config.preset import Preset

if TYPE_CHECKING:
    from kdctl.stages.context import Run

DEFAULT_PRESET = "quickstart"

PresetOption = Annotated[
    str | None,
    typer.Option("--preset", "-p", help="Preset name or path. (default: the run folder's own, or quickstart)"),
]
RunOption = Annotated[
    Path | None, typer.Option("--run", "-r", help="Run folder. (default: runs/<preset name>)", file_okay=False)
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override a preset field: section.field=value. Repeatable.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do the stage again even if it is complete.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the resolved preset as JSON and stop.")]


def _verbose(value: bool) -> bool:
    boundary.Known.verbose = value
    return value


VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_verbose,
        help="Let libraries print their warnings and bars; show where an error comes from.",
    ),
]


@dataclass(frozen=True)
class RunOptions:
    """Options of every command that resolves a preset."""

    run: RunOption = None
    settings: SetOption = None
    verbose: VerboseOption = False


@dataclass(frozen=True)
class StageOptions(RunOptions):
    """Options of every command that does one stage."""

    preset: PresetOption = None
    force: ForceOption = False
    as_json: JsonOption = False
    dry_run: DryRunOption = False


def process_rank() -> int:
    """Return which of the processes of a launcher this is; 0 without one."""
    return _launched("RANK", 0)


def process_count() -> int:
    """Return how many processes a launcher started; 1 without one."""
    return _launched("WORLD_SIZE", 1)


def _launched(variable: str, alone: int) -> int:
    """Read a number that a launcher sets. Raises PresetError where it is none."""
    found = os.environ.get(variable, str(alone))
    if not found.isdecimal():
        raise PresetError(
            f"the environment variable {variable} is {found!r}, and launchers set it to a number; unset it"
        )
    return int(found)


def check_launch(divided: bool) -> None:
    """Raise PresetError for what no launcher sets, before anything waits for processes that are not there.

    divided: several processes do this command together.
    """
    rank, count = process_rank(), process_count()
    for variable in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        _launched(variable, 0)
    if rank >= max(count, 1):
        raise PresetError(
            f"the environment has RANK={rank} and WORLD_SIZE={count}, and ranks are numbers from 0 to WORLD_SIZE - 1; "
            "start kdctl by accelerate launch or torchrun, or unset both"
        )
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if divided and count > 1 and lacking:
        raise PresetError(
            f"the environment has WORLD_SIZE={count} and no {lacking[0]}, which a launcher sets too; start kdctl by "
            "accelerate launch or torchrun, or unset WORLD_SIZE"
        )


@contextmanager
def guarded(divided: bool = False) -> Iterator[None]:
    """End a command that raises as ``boundary.py`` says: one message and an exit code.

    A run folder that it made for an input that is then refused is taken back. divided: several processes do this
    command together; any other is left to the main one.
    """
    boundary.Known.made = None
    try:
        check_launch(divided)
        if process_rank() and not divided:
            raise typer.Exit
        yield
        if process_count() > 1:
            from kdctl.system.distributed import leave

            leave()
    except (typer.Exit, typer.BadParameter, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - what it means is decided in one place
        code = boundary.end(error)
        if code == boundary.INPUT and boundary.Known.made is not None:
            from kdctl.stages.context import take_back

            take_back(boundary.Known.made)
        raise typer.Exit(code) from None


def resolve_preset(name: str | None, folder: Path | None, settings: list[str] | None, flags: Flags) -> Preset:
    """Find the preset that a command works with: named, the folder's own, or the default; flags win over --set."""
    overrides = resolve.parse_assignments(settings or []) | {k: v for k, v in flags.items() if v is not None}
    if name is None:
        own = (folder or Path("runs") / DEFAULT_PRESET) / "preset.json"
        name = str(own) if own.is_file() else DEFAULT_PRESET
    try:
        return resolve.load_preset(name, overrides)
    except PresetError as error:
        if isinstance(error.__context__, SumError) and (what := edited_settings(Path(name).parent)):
            raise PresetError(str(error).replace("was edited", f"was edited{what}", 1)) from None
        raise


def run_folder(name: str | None, folder: Path | None) -> Path:
    """Name the run folder: --run, or runs/<preset name>."""
    return folder or Path("runs") / Path(name or DEFAULT_PRESET).stem


def from_default(name: str | None, folder: Path) -> str:
    """Return what to say of a run folder that is new and gets the default preset: its name may be misspelled."""
    if name is not None or (folder / "preset.json").exists():
        return ""
    return f"new run folder {folder}, from preset {DEFAULT_PRESET}"


def prepare_libraries(offline: bool, verbose: bool) -> None:
    """Import the heavy libraries after setting what they read: offline mode and, unless verbose, silence."""
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        os.environ |= {"DATASETS_VERBOSITY": "critical", "HF_HUB_VERBOSITY": "error"}
        warnings.filterwarnings("ignore")
    with held():  # a signal in the middle of loading torch's libraries can abort the process
        from kdctl.model.load import quiet
        from kdctl.system.memory import freeze_imports

    if not verbose:
        quiet()
    freeze_imports()


class Stage:
    """One command's options, resolved; opens the run only when work is to be done."""

    def __init__(self, preset: str | None, options: RunOptions, dry_run: bool = False, flags: Flags | None = None):
        self.preset = resolve_preset(preset, options.run, options.settings, flags or {})
        self.folder = run_folder(preset, options.run)
        if self.preset.description == resolve.COMPARISON:
            raise PresetError(
                f"{self.folder} is a folder of kdctl compare, where models are measured and none is made; kdctl "
                f"compare MODEL MODEL --run {self.folder} measures more of them"
            )
        self.news = from_default(preset, self.folder)
        self.verbose = options.verbose
        boundary.Known.folder, boundary.Known.preset = self.folder, self.preset.model_dump_json(indent=2)
        if dry_run:
            console.show_json(self.preset.model_dump_json(indent=2))
            raise typer.Exit

    @classmethod
    def of(cls, options: StageOptions, flags: Flags) -> Self:
        """Resolve the options of a command that does one stage."""
        return cls(options.preset, options, options.dry_run, flags)

    def open(self, trains: bool = False) -> "Run":
        """Import the heavy parts and open the run folder; for training, several processes must divide a step's rows."""
        prepare_libraries(self.preset.runtime.offline, self.verbose)
        from kdctl.stages.context import open_run
        from kdctl.system.distributed import connect, started_too_few

        processes = connect(self.preset.runtime.device)
        if trains:
            processes.check_trainable(self.preset.distill)
        reporter = console.ConsoleReporter() if processes.is_main else Silent()
        if started_too_few():
            reporter.note("accelerate started one process only; with --multi_gpu it starts as many as were asked for")
        new = processes.count == 1 and not os.path.lexists(self.folder)
        opened = open_run(self.preset, self.folder, reporter=reporter, ranks=processes)
        boundary.Known.made = opened.context if new else None
        if self.news:
            reporter.note(self.news)
        return opened


def show(result: BaseModel, as_json: bool, render: Callable[[Any], None]) -> None:
    """Print a result as JSON or for people."""
    if as_json:
        console.show_json(result.model_dump_json(indent=2))
    else:
        render(result)


def show_json(results: Mapping[str, BaseModel]) -> None:
    """Print several results as one JSON object."""
    console.show_json(write_json({name: result.model_dump(mode="json") for name, result in results.items()}))
