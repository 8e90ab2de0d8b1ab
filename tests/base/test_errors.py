"""What another library says is one short line."""

import pytest

from kdctl.base.errors import brief


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("one\n\n  two\tthree ", "one two three"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
        ("no such type. Model type should be one of AConfig, BConfig", "no such type."),
        ("x" * 301, "x" * 300 + " …"),
    ],
)
def test_an_error_is_one_line_without_lists_and_never_empty(said: str, shown: str) -> None:
    assert brief(ValueError(said)) == shown
