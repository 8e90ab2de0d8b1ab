"""JSON that every reader takes: figures that are not finite are words, as in the records."""

import json
import math
from collections.abc import Mapping
from typing import Any


def write_json(value: Any) -> str:
    """Write a value as indented JSON; what is not finite as "Infinity", "-Infinity" or "NaN"."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value
