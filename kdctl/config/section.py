"""What every section of the preset is, and the kinds of number and text that its fields hold.

Numbers have the range of what computes or keeps them, so that none fails, or turns into another, after hours of work.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

Dtype = Literal["bfloat16", "float16", "float32"]
Number = TypeVar("Number", int, float)
SMALLEST, LARGEST = 1e-30, 1e30
LONGEST_TEXT = 4096


def within(low: float, high: float, why: str, zero: bool = False) -> AfterValidator:
    """Return a check that a number is in a range, or zero where that is allowed."""

    def check(value: Number) -> Number:
        if not (low <= value <= high or (zero and value == 0)):
            raise ValueError(f"must be {'0 or ' if zero else ''}from {low:g} to {high:g}: {why}")
        return value

    return AfterValidator(check)


def up_to(most: int, why: str) -> AfterValidator:
    """Return a check that a whole number is not larger than another."""

    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"must be {most} or less: {why}")
        return value

    return AfterValidator(check)


STORED = up_to(2**31 - 1, "what is counted is kept in 32 bits")
SINGLE = "float32, in which it is computed with, has no use for others"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1), STORED]
Natural = Annotated[int, Field(ge=0), STORED]
Few = Annotated[int, Field(ge=1), up_to(2**16, "more at once fit in no memory")]
Tokens = Annotated[int, Field(ge=1), up_to(2**20, "no network reads so many, and room is made for all of them")]
Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0), within(SMALLEST, LARGEST, SINGLE)]
Seed = Annotated[int, within(-(2**63), 2**63 - 1, "seeds are kept in 64 bits")]


def plain(value: Any) -> Any:
    """Return a value. Raises ValueError for text that no file can hold or that cannot name one."""
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, tuple):
        for one in value:
            plain(one)
    return value


def _check_text(text: str) -> None:
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"must have {LONGEST_TEXT} characters or fewer")
    if "\0" in text:
        raise ValueError("must not hold the character NUL, which ends names of files")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must be valid Unicode; rename what has another name")


class Section(BaseModel):
    """Base of all sections: frozen, closed, documented by the strings under its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    _plain = field_validator("*")(plain)
