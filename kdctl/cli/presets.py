"""``kdctl presets``: what ships, and what a preset is when all is filled in."""

import json
from typing import Annotated

import typer

from kdctl.base.errors import PresetError
from kdctl.cli import console
from kdctl.cli.options import SetOption, VerboseOption, guarded
from kdctl.config import resolve
from kdctl.config.preset import Preset


def presets(
    name: Annotated[str | None, typer.Argument(help="Preset to show.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a preset.")] = False,
    settings: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """List the shipped presets, show one resolved, or print the schema.

    Example: kdctl presets quickstart
    """
    with guarded():
        if settings and (name is None or schema):
            raise PresetError(
                "--set changes the preset that is shown, and this shows none; name one without --schema, as in "
                f"kdctl presets quickstart --set {settings[0]}"
            )
        if schema:
            console.show_json(json.dumps(Preset.model_json_schema(), indent=2, ensure_ascii=False))
        elif name is not None:
            preset = resolve.load_preset(name, resolve.parse_assignments(settings or []))
            console.show_json(preset.model_dump_json(indent=2))
        else:
            rows = [(each, resolve.load_preset(each).description) for each in resolve.preset_names()]
            console.show_pairs("presets", rows)
