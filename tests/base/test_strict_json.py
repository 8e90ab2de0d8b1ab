"""JSON that every reader takes."""

import json

import pytest

from kdctl.base.strict_json import write_json


def test_what_is_not_finite_is_written_as_words() -> None:
    text = write_json({"a": [1.5, float("inf")], "b": (float("-inf"), {"c": float("nan")}), "d": "é"})
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"a bare {name}"))
    assert found == {"a": [1.5, "Infinity"], "b": ["-Infinity", {"c": "NaN"}], "d": "é"}
