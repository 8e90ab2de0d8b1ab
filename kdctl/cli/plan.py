"""``kdctl plan``: what a run will take, before anything runs."""

from typing import Annotated

import typer

from kdctl.cli import render
from kdctl.cli.fields import options
from kdctl.cli.options import JsonOption, RunOptions, Stage, guarded, prepare_libraries, show


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
    as_json: JsonOption = False,
    *,
    where: RunOptions,
) -> None:
    """Say what a run will take before anything runs: memory, disk, tokens, and what to change if it does not fit.

    Reads the model's configuration only. Example: kdctl plan onpolicy --memory 24
    """
    with guarded():
        stage = Stage(preset, where)
        prepare_libraries(stage.preset.runtime.offline, where.verbose)
        from kdctl.cost.network import look_at
        from kdctl.cost.plan import find_machine, make_plan
        from kdctl.distill.divergence import Objective
        from kdctl.model.load import torch_dtype
        from kdctl.model.reference import find_config
        from kdctl.run.paths import RunDir

        teacher, distill = stage.preset.teacher, stage.preset.distill
        dtype = torch_dtype(teacher.dtype)
        config = find_config(teacher.model, dtype, teacher.revision, stage.preset.runtime.offline)
        network = look_at(config, stage.preset.quantize, dtype, Objective(distill.beta))
        machine = find_machine(stage.preset.runtime.device, stage.folder, memory)
        found = make_plan(stage.preset, network, machine, RunDir(stage.folder), shards)
        show(found, as_json, render.show_plan)
