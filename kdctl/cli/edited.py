"""Names what was changed by hand in a run folder's preset.json, as far as the records beside it tell."""

import json
from pathlib import Path
from typing import Any

RECORDS = {
    "quantize": ("student/quantize.json", (), ("bits", "group_size", "symmetric", "method", "skip")),
    "heldout": ("rollouts/heldout/manifest.json", ("sampling",), ("max_new_tokens", "seed")),
    "rollout": ("rollouts/teacher/manifest.json", ("sampling",), ("temperature", "top_p", "top_k", "max_new_tokens")),
}
"""Of sections: the record of what was made with them, where in it, and the settings that it holds."""


def edited_settings(folder: Path) -> str:
    """List what a run folder's preset.json says now and what it said, or return nothing."""
    found = []
    for section, (file, inner, names) in RECORDS.items():
        asked, made = _read(folder / "preset.json", section), _read(folder / file, *inner)
        found += [
            f"{section}.{name} is {asked[name]!r:.80} and was {made[name]!r:.80}"
            for name in names
            if name in asked and name in made and asked[name] != made[name]
        ]
    return f" ({', '.join(found)})" if found else ""


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """Return an object in a file, empty where it is not there or damaged."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            tree = tree[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
