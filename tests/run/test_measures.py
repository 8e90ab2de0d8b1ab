"""Numbers are written so that they can be read, however large they are."""

import pytest

from kdctl.run.measures import fixed


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.345678, "12.35"), (9_999_999.0, "9999999.00"), (1e7, "1e+07"), (4.13e14, "4.13e+14"), (float("inf"), "inf")],
)
def test_long_numbers_are_powers_of_ten(value: float, text: str) -> None:
    assert fixed(value, 2) == text
