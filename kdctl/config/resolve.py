"""Preset name or path, plus overrides, to a resolved ``Preset`` (no torch)."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kdctl.base.errors import PresetError
from kdctl.base.sums import SumError, without_sum
from kdctl.config.mixture import MixedSource, mix_name
from kdctl.config.preset import Preset

Tree = dict[str, Any]
LONGEST_NAME = 200
"""Bytes of a folder's name; file systems take 255, and files beside it have longer ones."""
COMPARISON = "Models made by any tool, measured against the first of them, which stands here as the teacher."
"""Description of the preset of a folder in which ``kdctl compare`` measures."""


def presets_dir() -> Path:
    """Return the folder of the shipped presets: inside an installed package, beside it in a source tree."""
    here = Path(__file__).resolve().parents[1]
    inside = here / "presets"
    return inside if inside.is_dir() else here.parent / "presets"


def preset_names() -> list[str]:
    """List the shipped presets by name."""
    return sorted(path.stem for path in presets_dir().glob("*.toml"))


def load_preset(name: str, overrides: Mapping[str, Any] | None = None) -> Preset:
    """Resolve a shipped preset's name or a path to a TOML file or resolved JSON, with dotted overrides on top.

    Raises PresetError for an unknown name, an unknown key (with a suggestion) or an invalid value.
    """
    return build_preset(read_tree(name), overrides or {}, origin=name)


def build_preset(tree: Tree, overrides: Mapping[str, Any], origin: str) -> Preset:
    """Apply dotted overrides to a tree of settings and validate the result."""
    for key, value in overrides.items():
        tree = with_value(tree, key.split("."), value)
    try:
        return Preset.model_validate(tree)
    except ValidationError as error:
        raise PresetError(explain(error, origin, overrides)) from None


def read_tree(name: str) -> Tree:
    """Read a preset's raw settings from its name or path."""
    path = presets_dir() / f"{name}.toml"
    if not _is_file(path):
        path = Path(name)
    if not _is_file(path):
        hint = suggest(name[:200], preset_names())
        raise PresetError(
            f"no preset {name!r:.200}{hint}; shipped presets: {', '.join(preset_names())}; a path works too"
        )
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(without_sum(text)) if path.suffix == ".json" else tomllib.loads(text)
    except SumError as error:
        raise PresetError(
            f"{path} is damaged or was edited: {error}. What the run folder holds was made with the settings that were "
            "there; put them back, or keep the edited ones, without that line, as a preset of their own for a new --run"
        ) from None
    except (ValueError, RecursionError) as error:
        raise PresetError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(tree, dict):
        raise PresetError(f"{path} holds {tree!r:.40}, not an object of sections; kdctl presets quickstart shows one")
    return tree


def _is_file(path: Path) -> bool:
    """Tell whether there is such a file; no name is too long or too odd to ask."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def with_value(tree: Tree, keys: list[str], value: Any) -> Tree:
    """Return a copy of a tree with one nested value replaced."""
    head, *rest = keys
    inner = tree.get(head, {})
    if rest and not isinstance(inner, dict):
        raise PresetError(f"{head} is a value, not a section; there is no {'.'.join(keys)}")
    return {**tree, head: with_value(inner, rest, value) if rest else value}


def parse_assignments(assignments: Iterable[str]) -> Tree:
    """Parse ``section.field=value`` strings; values are TOML, and text that is not TOML is a string."""
    parsed = {}
    for text in assignments:
        key, separator, raw = text.partition("=")
        if not separator or not key.strip():
            raise PresetError(f"--set {text!r} is not of the form section.field=value, for example distill.lr=1e-4")
        parsed[key.strip()] = parse_value(raw.strip())
    return parsed


def parse_value(raw: str) -> Any:
    """Parse one TOML value; anything else is a plain string."""
    try:
        found = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    return found["value"] if len(found) == 1 else raw


def explain(error: ValidationError, origin: str, overrides: Mapping[str, Any] | None = None) -> str:
    """Turn a validation error into lines that name the key, the value, the reason and the way out.

    overrides: what was set on top of the preset, which is to blame where it is not the preset itself.
    """
    lines: dict[str, list[str]] = {}
    for item in error.errors():
        key, blamed = _key(item["loc"]), f"preset {origin}"
        if any(f"{key}.".startswith(f"{name}.") for name in overrides or ()):
            blamed = f"set on top of preset {origin}"
        elif overrides and not item["loc"][1:]:
            blamed += f" with {', '.join(overrides)} set on top of it"
        lines.setdefault(blamed, []).append(_reason(key, item))
    return "; ".join(f"{blamed}: {'; '.join(reasons)}" for blamed, reasons in lines.items())


def _key(places: Sequence[int | str]) -> str:
    """Write where an error is; of ``prompts.train``, which is a name or a list, without the one that it is."""
    parts = [str(place) for place in places]
    return ".".join(parts[:2] + parts[3:] if parts[:2] == ["prompts", "train"] else parts)


KINDS = {
    "string_too_short": "must not be empty",
    "tuple_type": 'is a list, as in ["a", "b"]',
    "model_type": "is a section, whose fields are set one by one, as in section.field=value",
}


def _reason(key: str, item: ErrorDetails) -> str:
    """Say what is wrong with one key."""
    if item["type"] == "extra_forbidden":
        inside = [f"{key.rpartition('.')[0]}.{name}" for name in MixedSource.model_fields]
        known = inside if key.startswith("prompts.train.") else [*Preset.model_fields, *known_keys()]
        return f"unknown key {key:.200}{suggest(key, known)}"
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] in KINDS:
        return f"{key} {KINDS[item['type']]}; this is {item['input']!r:.200}"
    value = "" if isinstance(item["input"], dict | BaseModel) else f"={item['input']!r:.200}"
    return f"{key}{value}: {item['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def known_keys() -> list[str]:
    """List every dotted key of a preset, in schema order."""
    keys = []
    for name, field in Preset.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{inner}" for inner in section.model_fields]
        else:
            keys.append(name)
    return keys


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest choice, or nothing."""
    choices = list(choices)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    tail = word.rpartition(".")[2]
    near = near or [choice for choice in choices if choice.rpartition(".")[2] == tail][:1]
    return f" (did you mean {near[0]!r}?)" if near else ""


def canonical(value: Any) -> str:
    """Serialize to the one JSON text that hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def identity(stage: str, sections: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash what a stage reads: its preset sections and the fingerprints of its inputs. 16 hex digits."""
    dumped = {k: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for k, v in sections.items()}
    text = canonical({"stage": stage, "sections": dumped, "inputs": dict(inputs)})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def variant_name(preset: Preset, base: Preset) -> str:
    """Name a variant after λ, β, learning rate and seed, then whatever else differs from the run's preset.

    What cannot be a folder's name is replaced by its hash.
    """
    settings, usual = preset.distill, base.distill.model_dump()
    always = {"lmbda", "beta", "lr", "seed"}
    name = f"lambda{settings.lmbda:g}_beta{settings.beta:g}_lr{settings.lr:g}_seed{settings.seed}"
    for key, value in settings.model_dump().items():
        if key not in always and value != usual[key]:
            name += f"_{key}{value:g}" if isinstance(value, float) else f"_{key}{value}"
    if (mix := preset.prompts.mix) != base.prompts.mix:
        name += f"_mix-{mix_name(mix) if mix else 'own'}"
    if "/" in name or len(name.encode()) > LONGEST_NAME:
        return f"{name.partition('_seed')[0]}_{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name
