"""Write the reference pages that come from the code: commands, preset fields, records and Python functions.

``make docs`` runs it, and a test compares the committed pages with what it makes.
"""

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from kdctl.cli.app import app
from kdctl.config.preset import Preset
from kdctl.config.resolve import load_preset, preset_names

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "kdctl"
SHARED_FROM = 3
LINE = 90
FUNCTIONS = {
    "api": ("open_run", "quantize", "compare", "rollout", "distill", "evaluate", "report", "run_all"),
    "formats.verify": ("verify",),
    "formats.export": ("export",),
}
"""What is meant to be called from Python, by module."""
NOTE = "<!-- Made by docs/generate.py: change the code, then `make docs`. -->"


def main() -> None:
    """Write every generated page."""
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")


def cli_page() -> str:
    """Describe every command, its arguments and options; options of several commands stand once, first."""
    commands: Mapping[str, Any] = typer.main.get_command(app).commands  # pyright: ignore
    rows = {name: [_parameter(one) for one in command.params] for name, command in commands.items()}
    shared = _shared(rows.values())
    head = (
        "Results go to stdout, progress and notes to stderr. Exit codes are in [errors](errors.md), the fields that "
        "options set in [preset](preset.md). `kdctl --version` prints the version, `--help` after any command its own "
        "options."
    )
    every = _table(("option", "meaning"), shared)
    parts = [_title("Commands"), head, "## Options of several commands", every]
    return "\n\n".join([*parts, *(_command(name, commands[name], rows[name], shared) for name in commands)]) + "\n"


def _parameter(one: Any) -> tuple[str, str]:
    """Return how an option or argument is written, and what it means."""
    names = [*one.opts, *one.secondary_opts]
    option = names[0].startswith("-")
    words = ", ".join(f"`{name}`" for name in names) if option else f"`{one.metavar or names[0].upper()}`"
    default = getattr(one.default, "value", one.default)
    told = default in (None, False, 0, 0.0) or "(default" in (one.help or "") or bool(one.secondary_opts)
    return words, (one.help or "") + ("" if told else f" (default: {default})")


def _shared(commands: Iterable[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """List the options that mean the same in several commands."""
    every = [row for rows in commands for row in rows if row[0].startswith("`-")]
    return [row for row in dict.fromkeys(every) if every.count(row) >= SHARED_FROM]


def _command(name: str, command: Any, rows: list[tuple[str, str]], shared: list[tuple[str, str]]) -> str:
    """Describe one command: its help, its example, its own options, and which of the shared ones it takes."""
    text, _, example = inspect.cleandoc(command.help).partition("Example: ")
    own = [row for row in rows if row not in shared]
    also = ", ".join(row[0].split(",")[0] for row in rows if row in shared)
    parts = [f"## kdctl {name}", " ".join(text.split()), f"    {example.strip()}"]
    parts += [_table(("argument or option", "meaning"), own)] if own else []
    parts += [f"Also {also}: [above](#options-of-several-commands)."] if also else []
    return "\n\n".join(parts)


def preset_page() -> str:
    """Describe every field of a preset by its section, from the schema, and list the presets that are shipped."""
    schema = Preset.model_json_schema()
    head = (
        "A preset is a TOML file with these sections; what it leaves out has the default. `--set section.field=value` "
        "overrides a field on the command line, `kdctl presets NAME` shows a preset in full, and `kdctl presets "
        "--schema` prints the JSON Schema. A field that does not exist, or a value out of range, ends in exit code 2."
    )
    shipped = [(f"`{name}`", load_preset(name).description) for name in preset_names()]
    names = {name: each["$ref"] for name, each in schema["properties"].items() if "$ref" in each}
    sections = [_section(name, each, schema["$defs"]) for name, each in names.items()]
    sections.insert(list(names).index("prompts") + 1, _section("[[prompts.train]]", "MixedSource", schema["$defs"]))
    presets = ["## Shipped presets", _table(("preset", "what for"), shipped)]
    return "\n\n".join([_title("Preset fields"), head, *presets, *sections]) + "\n"


def _section(name: str, reference: str, definitions: Mapping[str, Any]) -> str:
    """Describe one section of the preset."""
    found = definitions[reference.rsplit("/", 1)[-1]]
    needed = found.get("required", ())
    rows = [
        (f"`{field}`", _kind(each, definitions), _default(field, each, needed), _markdown(each.get("description", "")))
        for field, each in found["properties"].items()
    ]
    table = _table(("field", "values", "default", "meaning"), rows)
    return f"## {name}\n\n{_markdown(found.get('description', ''))}\n\n{table}"


def _kind(each: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Say which values a field takes."""
    if "$ref" in each:
        return _kind(definitions[each["$ref"].rsplit("/", 1)[1]], definitions)
    if "enum" in each:
        return ", ".join(f"`{value}`" for value in each["enum"])
    if several := each.get("anyOf") or each.get("oneOf"):
        return " or ".join(_kind(one, definitions) for one in several if one.get("type") != "null")
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {each[key]:g}" for key, sign in bounds.items() if key in each)
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "array": "list"}
    return " ".join(part for part in (names.get(each.get("type", ""), "table"), limits) if part)


def _default(field: str, each: Mapping[str, Any], needed: Iterable[str]) -> str:
    """Write a default as TOML does; a dash where there is none."""
    value = each.get("default")
    if field in needed:
        return "must be given"
    if value is None:
        return "–"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def records_page() -> str:
    """Describe every JSON record that kdctl writes, and its fields, from the source."""
    head = (
        "Every JSON file in a run folder is one of these, and so is what `--json` prints; a row of a store is a "
        "Rollout. [The run folder](run-folder.md) says which file holds which. Units stand in the names: `_bytes`, "
        "`_s`, `_db`."
    )
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.glob("*/records.py"), key=_first)]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "Record"]
    return "\n\n".join([_title("Records"), head, *(_record(node) for node in classes)]) + "\n"


def _first(path: Path) -> tuple[bool, str]:
    """Order files of records: what a run leaves comes first."""
    return path.parent.name != "run", path.parent.name


def _record(node: ast.ClassDef) -> str:
    """Describe one record."""
    bases = [name for name in map(ast.unparse, node.bases) if name not in ("Record", "BaseModel")]
    more = f" It has the fields of {bases[0]} too." if bases else ""
    text = _markdown(ast.get_docstring(node) or "")
    return f"## {node.name}\n\n{text}{more}\n\n{_table(('field', 'type', 'meaning'), _fields(node))}"


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """Yield the fields of a class: name, type, and the string under it."""
    for line, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and not ast.unparse(line.target).startswith("_"):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = _markdown(str(after.value.value)) if told else ""  # pyright: ignore
            yield f"`{ast.unparse(line.target)}`", f"`{ast.unparse(line.annotation)}`", text


def api_page() -> str:
    """Describe the functions that are meant to be called from Python, from the source."""
    head = (
        "What the commands do, from Python. `open_run` returns a context and a teacher, which every stage takes first: "
        "`quantize(*run)`. A stage makes what it lacks from an earlier one, skips what is complete, and returns a "
        "[record](records.md). Errors that are the input's fault are kinds of [KdctlError](errors.md). An example "
        "stands on the front page and is run by the tests."
    )
    parts = [_functions(module, names) for module, names in FUNCTIONS.items()]
    return "\n\n".join([_title("Python"), head, *parts]) + "\n"


def _functions(module: str, names: Iterable[str]) -> str:
    """Describe some functions of a module, in this order."""
    parts = [f"## kdctl.{module}"]
    for name in names:
        node = _definition(module, name)
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        parts.append(f"### {name}\n\n```python\n{name}{_arguments(node.args)}{result}\n```")
        parts.append(_markdown(ast.get_docstring(node) or ""))
    return "\n\n".join(parts)


def _arguments(found: ast.arguments) -> str:
    """Write the arguments of a function, on one line or, where they are many, on one each."""
    defaults = [None] * (len(found.args) - len(found.defaults)) + found.defaults
    words = [_argument(each, default) for each, default in zip(found.args, defaults, strict=True)]
    words += ["*"] if found.kwonlyargs else []
    words += [_argument(each, default) for each, default in zip(found.kwonlyargs, found.kw_defaults, strict=True)]
    line = ", ".join(words)
    return f"({line})" if len(line) < LINE else "(\n    " + ",\n    ".join(words) + ",\n)"


def _argument(found: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(found) + (f" = {ast.unparse(default)}" if default else "")


def _definition(module: str, name: str) -> ast.FunctionDef:
    """Find a function in a module, or in the one that it is imported from."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]:
            return _definition(node.module.removeprefix("kdctl."), name)
    raise LookupError(f"kdctl.{module} has no function {name}")


def _title(text: str) -> str:
    return f"# {text}\n\n{NOTE}"


def _markdown(text: str) -> str:
    """Make a docstring Markdown: one line a paragraph, and single backquotes."""
    return "\n\n".join(" ".join(part.split()) for part in text.replace("``", "`").split("\n\n"))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Write a Markdown table; a bar in a cell is escaped, and an asterisk outside code."""
    lines = [head, ("---",) * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|").replace("\n", " "))
    return "".join(part if part.startswith("`") else part.replace("*", "\\*").replace("<", "&lt;") for part in parts)


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": cli_page,
    "reference/preset.md": preset_page,
    "reference/records.md": records_page,
    "reference/api.md": api_page,
}

if __name__ == "__main__":
    main()
