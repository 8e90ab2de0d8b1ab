"""``kdctl compare``: models of any origin, without a preset."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kdctl.base.errors import PresetError
from kdctl.cli import console
from kdctl.cli.fields import Flags, options
from kdctl.cli.options import JsonOption, SetOption, VerboseOption, guarded, prepare_libraries, show_json
from kdctl.cli.report import show_report
from kdctl.config import resolve

SECTIONS = ("teacher", "prompts", "heldout", "rollout", "eval", "runtime")


@options(
    "eval.tasks --task",
    "eval.limit",
    "eval.samples",
    "eval.temperature",
    "eval.allow_code_execution",
    "teacher.dtype",
    "runtime.offline --offline/--online",
)
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders, Hub ids, GGUF files or, after the first, addresses of servers; it is measured against."
        ),
    ],
    *,
    flags: Flags,
    run: Annotated[
        Path | None,
        typer.Option("--run", "-r", help="Folder to work in. (default: runs/compare-..., by what is compared)"),
    ] = None,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Also measure what each decoder layer costs alone, and draw it.")
    ] = False,
    settings: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure models made by any tool against the first: KL both ways, top-1, perplexity, tasks, flips, with verdicts.

    Example: kdctl compare ORIGINAL INT4 OTHER.gguf --task arc_easy_offline --limit 200
    """
    with guarded():
        given = resolve.parse_assignments(settings or []) | {k: v for k, v in flags.items() if v is not None}
        if any(key.split(".")[0] not in SECTIONS for key in given):
            raise PresetError(f"compare evaluates and makes nothing; --set takes the fields of {', '.join(SECTIONS)}")
        prepare_libraries(bool(given.get("runtime.offline")), verbose)
        from kdctl.report.columns import Results
        from kdctl.report.contrasts import Contrasts
        from kdctl.report.details import held_out
        from kdctl.report.study_reader import read_study
        from kdctl.stages import pipeline
        from kdctl.stages.comparison import compare_models
        from kdctl.stats.verdicts import MARGIN

        opened, found = compare_models(models, given, run, console.ConsoleReporter(), by_layer)
        if as_json:
            show_json(found)
        else:
            report = pipeline.report(opened.context)
            table = held_out(Results(read_study([opened.context.paths]), Contrasts(MARGIN)))
            more = {"tables": (*report.tables, table), "short_tables": (*report.short_tables, table)}
            show_report(replace(report, **more))
