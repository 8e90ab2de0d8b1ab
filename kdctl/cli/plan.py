"""``kdctl plan``: what a run will take, before anything runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kdctl.cli import render
from kdctl.cli.fields import options
from kdctl.cli.options import JsonOption, RunOptions, Stage, guarded, prepare_libraries, show
from kdctl.cost.rates import accelerator, find_rates


@dataclass(frozen=True)
class RateOptions:
    """Options that say how fast the machine is."""

    rates: Annotated[
        Path | None, typer.Option(help="Rates that benchmarks/rates.py measured, for seconds.", dir_okay=False)
    ] = None
    gpu: Annotated[
        str | None,
        typer.Option(help="Accelerator of kdctl's table, for seconds by its vendor's figures: h100, a100 ..."),
    ] = None
    tflops: Annotated[
        float | None, typer.Option(help="Dense products in the model's dtype, 10^12 operations a second.", min=1e-6)
    ] = None
    bandwidth: Annotated[float | None, typer.Option(help="Memory bandwidth, GB/s.", min=1e-6)] = None
    link: Annotated[float | None, typer.Option(help="From one process to another, GB/s each way.", min=1e-6)] = None


@options()
def plan(
    preset: Annotated[
        str | None, typer.Argument(help="Preset name or path. (default: the run folder's own, or quickstart)")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of memory to plan for, on a GPU unless runtime.device=cpu.", min=0.1)
    ] = None,
    shards: Annotated[
        int, typer.Option(help="Processes that FSDP2 divides training among; what each of them takes.", min=1)
    ] = 1,
    copies: Annotated[
        int,
        typer.Option(
            help="Processes that divide a step's rows, each with whole models, or groups of --shards processes.", min=1
        ),
    ] = 1,
    as_json: JsonOption = False,
    *,
    speed: RateOptions,
    where: RunOptions,
) -> None:
    """Say what a run will take before anything runs: memory, disk, tokens, seconds, and what to change to make it fit.

    Reads the model's configuration only. Example: kdctl plan onpolicy --gpu h100
    """
    with guarded():
        named = speed.gpu, speed.tflops, speed.bandwidth, speed.link
        rates = find_rates(speed.rates, *named, shards, copies)
        stage = Stage(preset, where)
        prepare_libraries(stage.preset.runtime.offline, where.verbose)
        from kdctl.cost.network import look_at
        from kdctl.cost.plan import check_processes, find_machine, make_plan
        from kdctl.distill.divergence import Objective
        from kdctl.model.load import torch_dtype
        from kdctl.model.reference import find_config
        from kdctl.run.paths import RunDir

        check_processes(stage.preset, shards, copies)
        teacher, distill = stage.preset.teacher, stage.preset.distill
        dtype = torch_dtype(teacher.dtype)
        config = find_config(teacher.model, dtype, teacher.revision, stage.preset.runtime.offline)
        network = look_at(config, stage.preset.quantize, dtype, Objective(distill.beta))
        known = accelerator(speed.gpu).memory_gib if speed.gpu else None
        machine = find_machine(stage.preset.runtime.device, stage.folder, memory or known)
        found = make_plan(stage.preset, network, machine, RunDir(stage.folder), shards, copies, rates)
        show(found, as_json, render.show_plan)
