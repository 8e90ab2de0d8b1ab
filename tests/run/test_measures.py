"""Numbers are written so that they can be read, however large or small they are."""

import pytest

from kdctl.run.measures import fixed


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.345678, "12.35"), (9_999_999.0, "9999999.00"), (1e7, "1e+07"), (4.13e14, "4.13e+14"), (float("inf"), "inf")],
)
def test_long_numbers_are_powers_of_ten(value: float, text: str) -> None:
    assert fixed(value, 2) == text


@pytest.mark.parametrize("value", [4.99e-5, 3.2e-5, 1e-12, 5e-324])
@pytest.mark.parametrize("sign", ["-", "+"])
def test_a_number_that_is_not_zero_is_not_written_as_zeros(value: float, sign: str) -> None:
    for found in (value, -value):
        assert f"{found:{sign}.4f}".strip("+-") == "0.0000"
        assert float(fixed(found, 4, sign)) == pytest.approx(found, rel=0.05)
    assert (fixed(3.2e-5, 4, sign), fixed(-3.2e-5, 4)) == (f"{3.2:{sign}}e-5", "-3.2e-5")


@pytest.mark.parametrize("value", [0.0, 5.1e-5, 0.0001, 0.1234, 12.0, -0.5])
@pytest.mark.parametrize("sign", ["-", "+"])
def test_a_number_whose_digits_are_seen_is_written_with_them(value: float, sign: str) -> None:
    assert fixed(value, 4, sign) == f"{value:{sign}.4f}"
