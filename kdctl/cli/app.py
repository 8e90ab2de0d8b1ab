"""The command line: resolve the preset, import the pipeline, run a stage, show the result."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kdctl.base.errors import PresetError
from kdctl.base.version import __version__
from kdctl.cli import console
from kdctl.cli.options import (
    DEFAULT_PRESET,
    DryRunOption,
    ForceOption,
    JsonOption,
    PresetOption,
    RunOption,
    SetOption,
    Stage,
    VerboseOption,
    console_views,
    guarded,
    prepare_libraries,
    process_rank,
    run_folder,
    show,
    show_json,
)
from kdctl.cli.plan import plan
from kdctl.cli.sweep import sweep
from kdctl.config import resolve
from kdctl.config.preset import Preset, QuantizeSection, Source
from kdctl.run.records import ExportFormat

app = typer.Typer(
    name="kdctl",
    help="Distill a language model into its own INT4 self and say, with statistics, whether the difference is real.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command line; kdctl's own errors end in one message and exit code 2. Only the main process speaks."""
    if process_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    app()


def with_methods(preset: Preset, methods: Sequence[str]) -> list[QuantizeSection]:
    """Return the quantize section once for each method. Raises PresetError for one that does not exist."""
    tree = preset.model_dump()
    return [resolve.build_preset(tree, {"quantize.method": method}, "--compare").quantize for method in methods]


@app.command()
def quantize(
    preset: PresetOption = None,
    run: RunOption = None,
    teacher: Annotated[str | None, typer.Option(help="Hub id, model folder, .gguf file, or pkg:PACKAGE/FILE.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per weight: 2, 3, 4 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights along in_features that share a scale.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Fix the zero point in the middle, or store one.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="minmax, hqq, gptq or autoround.")] = None,
    compared: Annotated[
        str | None, typer.Option("--compare", help="Methods, with commas: measure each, make no student.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave alone. Repeatable.")] = None,
    settings: SetOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make the INT4 student from the teacher by post-training quantization.

    Example: kdctl quantize --bits 4 --group-size 64 --method hqq
    """
    flags = {
        "teacher.model": teacher,
        "quantize.bits": bits,
        "quantize.group_size": group_size,
        "quantize.symmetric": symmetric,
        "quantize.method": method,
        "quantize.skip": skip,
    }
    with guarded(divided=True):
        if compared is not None and method is not None:
            raise PresetError("--compare names the methods itself; leave --method out")
        stage = Stage(preset, run, settings, verbose, dry_run, **flags)
        methods = list(dict.fromkeys(compared.split(","))) if compared is not None else []
        sections = with_methods(stage.preset, methods)
        opened = stage.open()
        from kdctl.stages import pipeline

        if not sections:
            show(pipeline.quantize(*opened, force=force), as_json, console_views().show_quantized)
            return
        results = pipeline.compare(*opened, sections, force=force)
        if as_json:
            show_json({result.method: result for result in results})
        else:
            console_views().show_compared(results)


@app.command()
def rollout(
    preset: PresetOption = None,
    run: RunOption = None,
    source: Annotated[
        Source | None,
        typer.Option(help="Who writes the completions. (default: every store that the preset's λ needs)"),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Prompts in the store.")] = None,
    num_generations: Annotated[int | None, typer.Option(help="Completions per prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest completion.")] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Mask end-of-sequence before this many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampled tokens.")] = None,
    example_count: Annotated[int, typer.Option("--show", help="Print this many decoded examples.", min=0)] = 0,
    settings: SetOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Sample completions into a store that training replays.

    Example: kdctl rollout --source teacher --show 3
    """
    flags = {
        "rollout.num_prompts": num_prompts,
        "rollout.num_generations": num_generations,
        "rollout.max_new_tokens": max_new_tokens,
        "rollout.min_new_tokens": min_new_tokens,
        "rollout.temperature": temperature,
        "rollout.seed": seed,
    }
    with guarded(divided=True):
        if as_json and example_count:
            raise PresetError("--show prints text and --json must not be mixed with it; leave one of them out")
        stage = Stage(preset, run, settings, verbose, dry_run, **flags)
        opened = stage.open()
        from kdctl.stages import pipeline

        sources: list[Source] = [source] if source else pipeline.needed_sources(stage.preset)
        if not sources:
            opened.context.reporter.note(
                "rollout: this preset generates during training (distill.refresh_every > 0); "
                "nothing to do, name a --source to fill a store anyway"
            )
        manifests = {name: pipeline.rollout(*opened, name, force=force) for name in sources}
        if as_json:
            show_json(manifests)
            return
        for name in sources:
            console_views().show_store(manifests[name])
            if example_count:
                console_views().show_examples(pipeline.examples(*opened, name, example_count))


@app.command()
def distill(
    preset: PresetOption = None,
    run: RunOption = None,
    lmbda: Annotated[
        float | None, typer.Option("--lambda", help="λ: share of student-generated sequences, 0 to 1.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="β: 0 forward KL, 1 reverse KL, between generalized JSD.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    train: Annotated[str | None, typer.Option(help="What learns: weights, lora or scales.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the λ draw and the data order.")] = None,
    refresh_every: Annotated[
        int | None, typer.Option(help="Steps between live generations; 0 replays rollouts/student.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the variant. (default: made of its settings)")] = None,
    min_gap: Annotated[
        float,
        typer.Option(help="Stop unless the PTQ student's KL to the teacher is surely this, nats a token.", min=0),
    ] = 0.0,
    wandb: Annotated[str | None, typer.Option(help="off, online or offline.")] = None,
    settings: SetOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train the student against the teacher, on data sets, on its own generations, or on a mix.

    Example: kdctl distill --lambda 1 --beta 1
    """
    flags = {
        "distill.lmbda": lmbda,
        "distill.beta": beta,
        "distill.lr": lr,
        "distill.steps": steps,
        "distill.train": train,
        "distill.seed": seed,
        "distill.refresh_every": refresh_every,
        "tracking.wandb": wandb,
    }
    with guarded(divided=True):
        stage = Stage(preset, run, settings, verbose, dry_run, **flags)
        opened = stage.open(trains=True)
        from kdctl.stages import pipeline

        show(
            pipeline.distill(*opened, name=name, force=force, min_gap=min_gap), as_json, console_views().show_distilled
        )


@app.command(name="eval")
def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(help="teacher, ptq, or names of variants. (default: all of them)")
    ] = None,
    preset: PresetOption = None,
    run: RunOption = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="lm-eval task. Repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in one forward pass.")] = None,
    also: Annotated[
        str | None, typer.Option(help="Model made elsewhere, of the teacher's tokenizer: a folder or Hub id.")
    ] = None,
    also_name: Annotated[str | None, typer.Option("--as", help="Name of the row of --also.")] = None,
    settings: SetOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score teacher, PTQ student and every variant: lm-eval tasks, KL to the teacher, perplexity.

    Example: kdctl eval --task arc_easy_offline --limit 100
    """
    flags = {"eval.tasks": task, "eval.limit": limit, "eval.batch_size": batch_size}
    with guarded(divided=True):
        if (also is None) != (also_name is None):
            raise PresetError("--also names a model and --as the name of its row; give both or neither")
        stage = Stage(preset, run, settings, verbose, dry_run, **flags)
        opened = stage.open()
        from kdctl.stages import pipeline

        foreign = pipeline.open_foreign(*opened, also_name, also) if also and also_name else None
        results = pipeline.evaluate(*opened, names=models or (), force=force, also=foreign)
        if as_json:
            show_json(results)
        else:
            console.show_text(pipeline.report(opened.context))


@app.command()
def report(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Run folders; several are joined. (default: --run)", file_okay=False)
    ] = None,
    run: RunOption = None,
    table: Annotated[str, typer.Option(help="markdown, csv, json, latex or html.")] = "markdown",
    layout: Annotated[
        str,
        typer.Option(
            help="main, lambda, beta, lr, steps, batch-size, rollout-length, mixed, rank, method; auto: those that can "
            "be filled."
        ),
    ] = "main",
    margin: Annotated[float, typer.Option(help="Differences up to this many points are equivalent.")] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder to write. (default: report/ in the run folder, or beside the first of several)"
        ),
    ] = None,
) -> None:
    """Say what differs, with statistics; print a table of it and write all of them to report/.

    Example: kdctl report --table markdown --layout auto
    """
    with guarded():
        if folders and run is not None:
            raise PresetError("run folders and --run name the same thing; leave --run out")
        from kdctl.report.front import write_report
        from kdctl.run.paths import RunDir

        runs = [RunDir(folder) for folder in folders or [run_folder(None, run)]]
        console.show_text(write_report(runs, table, layout, margin / 100, out))


@app.command(name="run")
def run_preset(
    preset: Annotated[
        str | None, typer.Argument(help="Preset name or path. (default: the run folder's own, or quickstart)")
    ] = None,
    run: RunOption = None,
    settings: SetOption = None,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run all five stages in order, skipping complete ones. Can be stopped and repeated.

    Example: kdctl run quickstart
    """
    with guarded(divided=True):
        opened = Stage(preset, run, settings, verbose, dry_run).open(trains=True)
        from kdctl.stages import pipeline

        console.show_text(pipeline.run_all(*opened))


app.command()(plan)


app.command()(sweep)


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(help="Student folder: a run's student, or distill/VARIANT/final in it.")
    ] = Path("runs") / DEFAULT_PRESET / "student",
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

        show(export_student(folder, to, out, exact), as_json, console_views().show_exported)


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(help="Student folder: a run's student, or distill/VARIANT/final in it.")
    ] = Path("runs") / DEFAULT_PRESET / "student",
    teacher: Annotated[
        str | None, typer.Option(help="What the student was made from. (default: the run folder's teacher)")
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prove a student folder: integrity, shapes, scales, three loaders equal to the bit, and the recorded errors.

    Exit code 0 if all passed, 1 if something failed, 2 if it is no student folder.
    Example: kdctl verify runs/quickstart/student
    """
    with guarded():
        prepare_libraries(teacher is None, verbose)
        from kdctl.formats.verify import find_teacher
        from kdctl.formats.verify import verify as verify_student
        from kdctl.model.load import pick_device

        report = verify_student(folder, find_teacher(folder, teacher), pick_device("auto"))
        show(report, as_json, console_views().show_verified)
        if not report.passed:
            raise typer.Exit(1)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Preset to show.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a preset.")] = False,
    settings: SetOption = None,
) -> None:
    """List the shipped presets, show one resolved, or print the schema.

    Example: kdctl presets quickstart
    """
    with guarded():
        if schema:
            console.show_text(json.dumps(Preset.model_json_schema(), indent=2, ensure_ascii=False))
        elif name is not None:
            preset = resolve.load_preset(name, resolve.parse_assignments(settings or []))
            console.show_text(preset.model_dump_json(indent=2))
        else:
            rows = [(each, resolve.load_preset(each).description) for each in resolve.preset_names()]
            console.show_pairs("presets", rows)


def _version(value: bool) -> None:
    if value:
        print(f"kdctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Distill a language model into its own INT4 self and say, with statistics, whether the difference is real."""


if __name__ == "__main__":
    sys.exit(main())
