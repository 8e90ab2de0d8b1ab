"""The command line: resolve the preset, import the pipeline, run a stage, show the result."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from kdctl.base.errors import PresetError
from kdctl.base.version import __version__
from kdctl.cli import console, render
from kdctl.cli.boundary import main as main
from kdctl.cli.compare import compare
from kdctl.cli.fields import Flags, options
from kdctl.cli.options import (
    DryRunOption,
    RunOptions,
    Stage,
    StageOptions,
    guarded,
    show,
    show_json,
)
from kdctl.cli.plan import plan
from kdctl.cli.presets import presets
from kdctl.cli.report import report, show_report
from kdctl.cli.student import export, verify
from kdctl.cli.sweep import sweep
from kdctl.config import resolve
from kdctl.config.preset import Preset, QuantizeSection, Source
from kdctl.quant.methods import QUANTIZERS
from kdctl.run.records import QuantizeReport

METHODS = ", ".join(QUANTIZERS)

app = typer.Typer(
    name="kdctl",
    help="Distill a language model into its own INT4 self and say, with statistics, whether the difference is real.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def with_methods(preset: Preset, methods: Sequence[str]) -> list[QuantizeSection]:
    """Return the quantize section once for each method. Raises PresetError for one that does not exist."""
    for method in methods:
        if method not in QUANTIZERS:
            raise PresetError(
                f"--compare: no method {method!r:.80}{resolve.suggest(method[:80], QUANTIZERS)}; it takes {METHODS}, "
                "with commas between them"
            )
    tree = preset.model_dump()
    return [resolve.build_preset(tree, {"quantize.method": method}, "--compare").quantize for method in methods]


@app.command()
@options(
    "teacher.model --teacher",
    "quantize.bits",
    "quantize.group_size",
    "quantize.symmetric --symmetric/--asymmetric",
    "quantize.method",
    "quantize.skip",
)
def quantize(
    flags: Flags,
    compared: Annotated[
        str | None, typer.Option("--compare", help=f"Methods, with commas ({METHODS}): measure each, make no student.")
    ] = None,
    *,
    common: StageOptions,
) -> None:
    """Make the INT4 student from the teacher by post-training quantization.

    Example: kdctl quantize --bits 4 --group-size 64 --method hqq
    """
    with guarded(divided=True):
        if compared is not None and flags["quantize.method"] is not None:
            raise PresetError("--compare names the methods itself; leave --method out")
        stage = Stage.of(common, flags)
        methods = list(dict.fromkeys(compared.split(","))) if compared is not None else []
        sections = with_methods(stage.preset, methods)
        opened = stage.open()
        from kdctl.stages import pipeline

        if not sections:
            from kdctl.stages.outlook import outlook

            def with_outlook(report: QuantizeReport) -> None:
                render.show_quantized(report)
                console.show_paragraph(outlook(report, stage.preset.quantize.calibration_sequences))

            show(pipeline.quantize(*opened, force=common.force), common.as_json, with_outlook)
            return
        results = pipeline.compare(*opened, sections, force=common.force)
        if common.as_json:
            show_json({result.method: result for result in results})
        else:
            render.show_compared(results)


@app.command()
@options(
    "rollout.num_prompts",
    "rollout.num_generations",
    "rollout.max_new_tokens",
    "rollout.min_new_tokens",
    "rollout.temperature",
    "rollout.seed",
    "rollout.engine",
    "rollout.url",
    "rollout.serve",
)
def rollout(
    flags: Flags,
    source: Annotated[
        Source | None,
        typer.Option(help="Who writes the completions. (default: every store that the preset's λ needs)"),
    ] = None,
    example_count: Annotated[int, typer.Option("--show", help="Print this many decoded examples.", min=0)] = 0,
    *,
    common: StageOptions,
) -> None:
    """Sample completions into a store that training replays.

    Example: kdctl rollout --source teacher --show 3
    """
    with guarded(divided=True):
        if common.as_json and example_count:
            raise PresetError("--show prints text and --json must not be mixed with it; leave one of them out")
        stage = Stage.of(common, flags)
        opened = stage.open()
        from kdctl.stages import pipeline

        sources: list[Source] = [source] if source else pipeline.needed_sources(stage.preset)
        if not sources:
            opened.context.reporter.note(
                "rollout: this preset generates during training (distill.refresh_every > 0); "
                "nothing to do, name a --source to fill a store anyway"
            )
        manifests = {name: pipeline.rollout(*opened, name, force=common.force, named=bool(source)) for name in sources}
        if common.as_json:
            show_json(manifests)
            return
        for name in sources:
            render.show_store(manifests[name])
            if example_count:
                render.show_examples(pipeline.examples(*opened, name, example_count))


@app.command()
@options(
    "distill.lmbda --lambda",
    "distill.beta",
    "distill.lr",
    "distill.steps",
    "distill.train",
    "distill.seed",
    "distill.refresh_every",
    "rollout.engine",
    "rollout.url",
    "rollout.serve",
    "tracking.wandb",
)
def distill(
    flags: Flags,
    name: Annotated[str | None, typer.Option(help="Name of the variant. (default: made of its settings)")] = None,
    min_gap: Annotated[
        float,
        typer.Option(help="Stop unless the PTQ student's KL to the teacher is surely this, nats a token.", min=0),
    ] = 0.0,
    *,
    common: StageOptions,
) -> None:
    """Train the student against the teacher, on data sets, on its own generations, or on a mix.

    Example: kdctl distill --lambda 1 --beta 1
    """
    with guarded(divided=True):
        stage = Stage.of(common, flags)
        opened = stage.open(trains=True)
        from kdctl.stages import pipeline

        show(
            pipeline.distill(*opened, name=name, force=common.force, min_gap=min_gap),
            common.as_json,
            render.show_distilled,
        )


@app.command(name="eval")
@options(
    "eval.tasks --task",
    "eval.limit",
    "eval.batch_size",
    "eval.samples",
    "eval.temperature",
    "eval.allow_code_execution",
)
def evaluate(
    *,
    models: Annotated[
        list[str] | None, typer.Argument(help="teacher, ptq, or names of variants. (default: all of them)")
    ] = None,
    flags: Flags,
    also: Annotated[
        str | None, typer.Option(help="Model made elsewhere, of the teacher's tokenizer: a folder or Hub id.")
    ] = None,
    also_name: Annotated[str | None, typer.Option("--as", help="Name of the row of --also.")] = None,
    common: StageOptions,
) -> None:
    """Score teacher, PTQ student and every variant: lm-eval tasks, KL to the teacher, perplexity.

    Example: kdctl eval --task arc_easy_offline --limit 100
    """
    with guarded(divided=True):
        if (also is None) != (also_name is None):
            raise PresetError("--also names a model and --as the name of its row; give both or neither")
        stage = Stage.of(common, flags)
        opened = stage.open()
        from kdctl.stages import pipeline

        foreign = pipeline.open_foreign(*opened, also_name, also) if also and also_name else None
        results = pipeline.evaluate(*opened, names=models or (), force=common.force, also=foreign)
        if common.as_json:
            show_json(results)
        else:
            show_report(pipeline.report(opened.context))


app.command()(compare)
app.command()(report)


@app.command(name="run")
@options()
def run_preset(
    preset: Annotated[
        str | None, typer.Argument(help="Preset name or path. (default: the run folder's own, or quickstart)")
    ] = None,
    dry_run: DryRunOption = False,
    *,
    where: RunOptions,
) -> None:
    """Run all five stages in order, skipping complete ones. Can be stopped and repeated.

    Example: kdctl run quickstart
    """
    with guarded(divided=True):
        opened = Stage(preset, where, dry_run).open(trains=True)
        from kdctl.stages import pipeline

        show_report(pipeline.run_all(*opened))


app.command()(plan)
app.command()(sweep)
app.command()(export)
app.command()(verify)
app.command()(presets)


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
