"""A finished run folder with something of everything in it, and what tells two of them apart."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts.base import expect
from parts.tiny import make_model, write_preset
from parts.warm import Ended, in_child, run_kdctl

SWEEP = "method: grid\nparameters:\n  lr: {values: [0.001, 0.002]}\n"
STAGES: dict[str, tuple[str, ...]] = {
    "quantize": ("quantize", "--preset", "p.json", "--run", "r", "--json"),
    "rollout": ("rollout", "--run", "r", "--source", "teacher", "--json"),
    "distill": ("distill", "--run", "r", "--name", "v", "--json"),
    "eval": ("eval", "ptq", "v", "--run", "r", "--json"),
    "report": ("report", "r", "--table", "json"),
    "compare": ("quantize", "--run", "r", "--compare", "minmax", "--json"),
    "gguf": ("export", "r/student", "--to", "gguf", "--out", "s.gguf", "--json"),
    "hqq": ("export", "r/student", "--to", "hqq", "--json"),
    "dense": ("export", "r/distill/v/final", "--to", "dense", "--json"),
    "sweep": ("sweep", "s.yaml", "--run", "r", "--no-eval", "--json"),
}
"""Commands in order; each finds what those before it made."""
VOLATILE = re.compile(r"seconds|_s$|^time/|^sum$|^since$|^metrics$")
NOT_COMPARED = re.compile(r"\.(lock|log|png|svg)$|^/cache/|locks/|report/|README\.md$|SHA256SUMS$|quantize\.json$")
TEMPORARY = re.compile(r"\.(tmp|old|new)$")


def prepare(where: Path) -> None:
    """Lay out an empty place: a model, presets and a sweep."""
    in_child(lambda: str(make_model(where / "m")), where)
    settings: dict[str, Any] = {"distill__lmbda": 0.5, "rollout__keep_states": "exact", "distill__keep_last": 2}
    write_preset(where / "p.json", "m", **settings)
    (where / "s.yaml").write_text(SWEEP, encoding="utf-8")


def stage(name: str, cwd: Path) -> Ended:
    """Run a stage undisturbed."""
    ended = run_kdctl(STAGES[name], cwd)
    expect(ended.code == 0, f"{name} ends undisturbed with {ended.code}: {ended.err[-2000:]}")
    return ended


def unfinish(run: Path) -> None:
    """Make variant ``u`` of ``v``, as if it had been killed before its last step."""
    variant = shutil.copytree(run / "distill" / "v", run / "distill" / "u")
    (variant / "distill.json").unlink()
    shutil.rmtree(variant / "final")
    for path in sorted((variant / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)


def steady(value: Any) -> Any:
    """Return what was printed or written without what the clock decides."""
    if isinstance(value, dict):
        return {key: steady(inner) for key, inner in value.items() if not VOLATILE.search(key)}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


def printed(text: str) -> Any:
    """Return a command's JSON without what the clock decides."""
    return steady(json.loads(text)) if text.strip() else ""


def unlike(found: Any, expected: Any) -> str:
    """Name the first place where two results differ."""
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        different = [key for key in found if found[key] != expected[key]]
        return f"{different[0]} {unlike(found[different[0]], expected[different[0]])}" if different else "nothing"
    return f"{str(found)[:300]}, not {str(expected)[:300]}"


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file of a folder that equal work leaves equal, without what the clock decides."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = "/" + path.relative_to(folder).as_posix()
        if path.is_file() and not NOT_COMPARED.search(name):
            data = path.read_bytes()
            if path.suffix in (".json", ".jsonl"):
                data = _values(data, path.suffix == ".jsonl")
            elif path.name.endswith(".states.safetensors"):
                data = _tensors(data)
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def _values(data: bytes, lines: bool) -> bytes:
    """Return JSON without what the clock decides; what is none stays as it is."""
    try:
        return json.dumps([steady(json.loads(part)) for part in (data.splitlines() if lines else [data])]).encode()
    except ValueError:
        return data


def _tensors(data: bytes) -> bytes:
    """Return the numbers of a safetensors file, whose metadata stand in no fixed order."""
    return data[8 + int.from_bytes(data[:8], "little") :]


def differences(found: dict[str, str], expected: dict[str, str]) -> Sequence[str]:
    """Name the files that are not the same."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def left_over(folder: Path) -> list[str]:
    """List temporary files and folders."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if TEMPORARY.search(path.name)]


def check_message(ended: Ended, what: str) -> None:
    """Raise Broken unless a run ended with one message and exit code 2."""
    expect(ended.code == 2, f"{what}: exit code {ended.code}, not 2: {ended.err[-1500:]}")
    expect("Traceback" not in ended.err and bool(ended.err.strip()), f"{what}: {ended.err[-1500:]}")
