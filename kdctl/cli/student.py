"""``kdctl export`` and ``kdctl verify``: what is done with a finished student folder."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from kdctl.base.errors import PresetError
from kdctl.cli import console, render
from kdctl.cli.options import DEFAULT_PRESET, JsonOption, VerboseOption, guarded, prepare_libraries, show
from kdctl.config.preset import Form, RolloutSection
from kdctl.formats.records import ExportFormat

DEFAULT_STUDENT = Path("runs") / DEFAULT_PRESET / "student"
StudentFolder = Annotated[Path, typer.Argument(help="Student folder: a run's student, or distill/VARIANT/final in it.")]


def export(
    folder: StudentFolder = DEFAULT_STUDENT,
    to: Annotated[
        ExportFormat, typer.Option("--to", help="Format: for llama.cpp, plain safetensors, or hqq.")
    ] = "gguf",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder or .gguf file to write. (default: beside FOLDER)")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="gguf: take 5.5 bits a weight where 5.0 would have to round an offset.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a student for another program: GGUF for llama.cpp, plain safetensors, or hqq's own format.

    Example: kdctl export runs/quickstart/student --to gguf
    """
    with guarded():
        if exact and to != "gguf":
            raise PresetError(f"--exact chooses a GGUF type, and --to {to} is exact in any case; leave it out")
        prepare_libraries(True, verbose)
        from kdctl.formats.export import export as export_student

        show(export_student(folder, to, out, exact, console.ConsoleReporter().note), as_json, render.show_exported)


def verify(
    folder: StudentFolder = DEFAULT_STUDENT,
    teacher: Annotated[
        str | None, typer.Option(help="What the student was made from. (default: the run folder's teacher)")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Also open it in a server and compare: vllm, sglang, llama-server, a command with {port} and "
            "{weights} in it, or the http:// address of one that holds it."
        ),
    ] = None,
    weights: Annotated[
        Form | None,
        typer.Option(help="How the server that --engine starts takes the student. (default: what its kind takes)"),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prove a student folder: integrity, shapes, scales, three loaders equal to the bit, and the recorded errors.

    Exit code 0 if all passed, 1 if something failed, 2 if it is no student folder.
    Example: kdctl verify runs/quickstart/student
    """
    with guarded():
        _check_engine(engine, weights)
        prepare_libraries(teacher is None, verbose)
        from kdctl.formats.verify import find_teacher, reported
        from kdctl.formats.verify import verify as verify_student
        from kdctl.model.load import pick_device

        report = verify_student(folder, find_teacher(folder, teacher), pick_device("auto"), console.ConsoleReporter())
        if engine is not None:
            from kdctl.formats.served import check_served

            served = check_served(folder, engine, weights, pick_device("auto"), console.ConsoleReporter())
            report = reported(folder, (*report.checks, *served))
        show(report, as_json, render.show_verified)
        if not report.passed:
            raise typer.Exit(1)


def _check_engine(engine: str | None, weights: Form | None) -> None:
    """Raise PresetError for an engine that is neither a name nor a command nor an address, before any work."""
    if engine is None:
        if weights is not None:
            raise PresetError("--weights says how a server takes the student, and --engine names none; give both")
        return
    where = {"url": (engine,)} if engine.startswith(("http://", "https://")) else {"serve": engine}
    try:
        RolloutSection(engine="server", **where)  # pyright: ignore[reportArgumentType]
    except ValidationError as error:
        raise PresetError(f"--engine: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
