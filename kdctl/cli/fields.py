"""Options made of what is declared once: preset fields, and dataclasses of options that commands share."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from kdctl.config.preset import Preset

Flags = dict[str, Any]
"""Values of preset fields by dotted key; None where an option was not given."""
Command = Callable[..., None]
Parameters = dict[str, inspect.Parameter]


def options(*keys: str) -> Callable[[Command], Command]:
    """Turn each dataclass that a command takes into options, one a field, and its ``flags`` into one a preset field.

    keys: dotted ones, each with the option's name behind it where that is not the field's: ``eval.tasks --task``.
    """
    fields = {key.split()[0]: field(*key.split()) for key in keys}

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
        shared = {name: _parameters(group) for name, group in groups.items()}

        @wraps(command)
        def spread(**values: Any) -> None:
            parts: dict[str, Any] = {
                name: group(**{each: values.pop(each) for each in shared[name]}) for name, group in groups.items()
            }
            if fields:
                parts["flags"] = {key: values.pop(option.name) for key, option in fields.items()}
            command(**values, **parts)

        _replace_signature(spread, _in_place(command, shared | {"flags": fields}))
        return spread

    return decorate


def field(key: str, name: str | None = None) -> inspect.Parameter:
    """Make the option of a preset field, described by the words under the field."""
    section, leaf = key.split(".")
    model: Any = Preset.model_fields[section].annotation
    found = model.model_fields[leaf]
    kind, extra = _kind(found.annotation)
    if isinstance(found.json_schema_extra, dict):
        extra = f" ({', '.join(map(str, found.json_schema_extra['enum']))})"
    text = f"{found.description.replace('``', '')}{extra}"
    option = typer.Option(name or "--" + leaf.replace("_", "-"), help=text)
    return _parameter(key.replace(".", "_"), Annotated[kind | None, option], None)


def _kind(annotation: Any) -> tuple[Any, str]:
    """Return the type that an option reads for a field's, and what help adds about it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return _kind(next(each for each in arguments if each is not NoneType))
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return type(arguments[0]), f" ({', '.join(map(str, arguments))})"
    if origin is tuple:
        return list[_kind(arguments[0])[0]], " Repeatable."
    return annotation, ""


def _parameters(group: Any) -> Parameters:
    """Return the options of a dataclass, by field."""
    hints = get_type_hints(group, include_extras=True)
    return {each.name: _parameter(each.name, hints[each.name], each.default) for each in dataclasses.fields(group)}


def _in_place(command: Command, spread: Mapping[str, Parameters]) -> Iterator[inspect.Parameter]:
    """Put options in the place of the parameter that they are spread from."""
    for name, own in inspect.signature(command).parameters.items():
        yield from spread[name].values() if name in spread else [own]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _replace_signature(command: Command, parameters: Iterable[inspect.Parameter]) -> None:
    """Show typer these parameters in place of the command's own."""
    named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    vars(command)["__signature__"] = inspect.Signature(named)
    command.__annotations__ = {}
