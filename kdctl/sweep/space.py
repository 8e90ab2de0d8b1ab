"""A wandb sweep file to parameters that are preset fields.

The format is wandb's sweep configuration (docs.wandb.ai/models/sweeps/sweep-config-keys), read unchanged. A parameter
with one value is a setting of the whole sweep, the others are swept; ``preset`` with one value names the base preset.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdctl.base.errors import PresetError, brief
from kdctl.config.resolve import known_keys, presets_dir, suggest

Method = Literal["grid", "random", "bayes"]
Number = int | float
PRESET = "preset"
DEFAULT_METRIC = "eval/forward_kl"
DRAWN_HERE = ("int_uniform", "uniform", "q_uniform", "log_uniform_values")


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Metric(_Closed):
    """What makes one trial better than another."""

    name: str = DEFAULT_METRIC
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None

    @property
    def sign(self) -> int:
        """Return what a value is multiplied with to make smaller better."""
        return 1 if self.goal == "minimize" else -1


class ParameterEntry(_Closed):
    """One entry of ``parameters``, as wandb writes it."""

    value: Any = None
    values: list[Any] | None = None
    probabilities: list[float] | None = None
    distribution: str | None = None
    min: Number | None = None
    max: Number | None = None
    q: Number | None = None
    mu: float | None = None
    sigma: float | None = None
    parameters: "dict[str, ParameterEntry] | None" = None


class EarlyTerminate(_Closed):
    """When trials that fall behind are stopped."""

    type: Literal["hyperband"]
    min_iter: Annotated[int, Field(ge=1)] | None = None
    max_iter: Annotated[int, Field(ge=1)] | None = None
    s: Annotated[int, Field(ge=1)] | None = None
    eta: Annotated[int, Field(ge=2)] = 3
    strict: bool = False


class SweepFile(_Closed):
    """A sweep file's keys. Those from ``program`` on matter to wandb only."""

    method: Method
    parameters: dict[str, ParameterEntry]
    metric: Metric | None = None
    run_cap: int | None = None
    early_terminate: EarlyTerminate | None = None
    name: str | None = None
    description: str | None = None
    program: str | None = None
    command: list[str] | None = None
    project: str | None = None
    entity: str | None = None


@dataclass(frozen=True)
class Choice:
    """A swept field with a list of values."""

    key: str
    values: tuple[Any, ...]

    def extremes(self) -> tuple[Any, ...]:
        """Return every value."""
        return self.values


@dataclass(frozen=True)
class Interval:
    """A swept field between two bounds, both included. step: None for a continuum."""

    key: str
    low: Number
    high: Number
    step: Number | None = None
    logarithmic: bool = False

    def extremes(self) -> tuple[Any, ...]:
        """Return the two bounds."""
        return self.low, self.high


@dataclass(frozen=True)
class Foreign:
    """A swept field whose distribution only wandb draws from. reason: what to say to someone who tries here."""

    key: str
    reason: str

    def extremes(self) -> tuple[Any, ...]:
        """Return nothing: the values are wandb's affair."""
        return ()


Parameter = Choice | Interval | Foreign


@dataclass(frozen=True)
class Sweep:
    """A sweep file, understood. settings: fields with one value. origin: the name or path it was read from."""

    name: str
    origin: str
    file: SweepFile
    parameters: tuple[Parameter, ...]
    settings: dict[str, Any]
    preset: str | None

    @property
    def method(self) -> Method:
        """Return how trials are chosen."""
        return self.file.method

    @property
    def metric(self) -> Metric:
        """Return what is compared: held-out KL unless the file says otherwise."""
        return self.file.metric or Metric()


def sweeps_dir() -> Path:
    """Return the folder of the shipped sweep files."""
    return presets_dir() / "sweeps"


def sweep_names() -> list[str]:
    """List the shipped sweep files by name."""
    return sorted(path.stem for path in sweeps_dir().glob("*.yaml"))


def find_sweep(name: str) -> Path:
    """Return the file of a shipped sweep's name or a path. Raises PresetError if there is none."""
    for path in (sweeps_dir() / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    names = sweep_names()
    raise PresetError(f"no sweep {name!r}{suggest(name, names)}; shipped sweeps: {', '.join(names)}; a path works too")


def read_sweep(name: str) -> Sweep:
    """Read a shipped sweep or a file.

    Raises PresetError for YAML that is none, keys that wandb does not know, fields that no preset has, and
    distributions that cannot be drawn from here.
    """
    path = find_sweep(name)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PresetError(f"{path} is not valid YAML: {brief(error)}") from None
    if not isinstance(tree, dict):
        raise PresetError(f"{path} holds {tree!r:.40}, not a wandb sweep with method and parameters")
    try:
        file = SweepFile.model_validate(tree)
    except ValidationError as error:
        raise PresetError(_explain(error, path)) from None
    return _understand(name, path, file)


def _understand(name: str, path: Path, file: SweepFile) -> Sweep:
    """Split a file's parameters into those that are swept and settings of the whole sweep."""
    swept: dict[str, Parameter] = {}
    settings: dict[str, Any] = {}
    for written, entry in flat(file.parameters):
        key = field_of(written, str(path))
        if key in swept or key in settings:
            raise PresetError(f"{path}: parameter {written!r} is {key}, which another parameter sets already")
        values = _values(entry)
        if values is not None and len(values) == 1:
            settings[key] = values[0]
        else:
            swept[key] = _parameter(key, entry, f"{path}: parameter {written!r}")
    preset = settings.pop(PRESET, None)
    if PRESET in swept or not isinstance(preset, str | None):
        raise PresetError(f"{path}: parameter 'preset' names the one preset that all trials start from: value: NAME")
    if not swept:
        raise PresetError(f"{path} sweeps nothing: give at least one parameter several values, or min and max")
    return Sweep(path.stem, name, file, tuple(swept.values()), settings, preset)


def flat(entries: dict[str, ParameterEntry], prefix: str = "") -> Iterator[tuple[str, ParameterEntry]]:
    """List parameters, nested ones under their dotted names."""
    for name, entry in entries.items():
        if entry.parameters is None:
            yield prefix + name, entry
        else:
            yield from flat(entry.parameters, f"{prefix}{name}.")


def field_of(name: str, where: str) -> str:
    """Return the dotted preset field that a name means. Raises PresetError if there is none, or more than one."""
    known = [key for key in known_keys() if "." in key]
    if name in known or name == PRESET:
        return name
    found = [key for key in known if key.rpartition(".")[2] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise PresetError(f"{where}: {name!r} may mean {' or '.join(found)}; write one of them")
    raise PresetError(
        f"{where}: no preset has a field {name!r}{suggest(name, [*known, PRESET])}; kdctl presets --schema"
    )


def _values(entry: ParameterEntry) -> list[Any] | None:
    """Return the values that an entry lists, if it does."""
    if "value" in entry.model_fields_set:
        return [entry.value]
    return entry.values


def _parameter(key: str, entry: ParameterEntry, where: str) -> Parameter:
    """Turn an entry into what can be drawn from. Raises PresetError for what makes no sense to wandb either."""
    if entry.values is not None:
        if len(set(map(repr, entry.values))) < max(len(entry.values), 1):
            raise PresetError(f"{where}: values={entry.values} is empty or holds a value twice")
        if entry.probabilities is not None:
            return Foreign(key, f"{where} has probabilities, which are not drawn from here; list the values without")
        return Choice(key, tuple(entry.values))
    kind = entry.distribution or ("int_uniform" if _both_integers(entry) else "uniform")
    if kind not in DRAWN_HERE:
        return Foreign(key, f"{where}: distribution {kind!r} is not drawn from here, only {', '.join(DRAWN_HERE)}")
    if entry.min is None or entry.max is None or entry.min >= entry.max:
        raise PresetError(f"{where}: give value, values, or min below max; min is {entry.min}, max is {entry.max}")
    if kind == "log_uniform_values" and entry.min <= 0:
        raise PresetError(f"{where}: {kind} needs min above 0; min is {entry.min}")
    if kind == "int_uniform" and not _both_integers(entry):
        raise PresetError(f"{where}: {kind} needs whole numbers; min is {entry.min}, max is {entry.max}")
    if kind == "q_uniform" and entry.q is not None and not 0 < entry.q <= entry.max - entry.min:
        raise PresetError(f"{where}: {kind} needs q above 0 and no wider than the range; q is {entry.q}")
    step = {"int_uniform": 1, "q_uniform": entry.q or 1}.get(kind)
    return Interval(key, entry.min, entry.max, step, kind == "log_uniform_values")


def _both_integers(entry: ParameterEntry) -> bool:
    return isinstance(entry.min, int) and isinstance(entry.max, int)


def _explain(error: ValidationError, path: Path) -> str:
    """Turn a validation error into one line."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            trial = key == "preset" or key in known_keys()
            place = f"; what trials are given stands under parameters, as {key}: {{value: ...}}" if trial else ""
            lines.append(f"unknown key {key}{place or suggest(key, SweepFile.model_fields)}")
        else:
            lines.append(f"{key}: {item['msg']}")
    return f"{path} is not a wandb sweep: " + "; ".join(lines)
