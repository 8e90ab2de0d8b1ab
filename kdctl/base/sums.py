"""A JSON object that carries a hash of its own text, so that a flipped digit is noticed by whoever reads it."""

import hashlib
import re


class SumError(ValueError):
    """A text is not the one that was written."""


END = "\n}\n"
LAST = re.compile(r',\n  "sum": "([0-9a-f]{64})"\n}\n\Z')


def with_sum(text: str) -> str:
    """Add the field ``sum`` to an indented JSON object: the sha256 of the text without it."""
    return f'{text.removesuffix(END)},\n  "sum": "{_hash(text)}"{END}'


def without_sum(text: str) -> str:
    """Undo ``with_sum``; a text without the field is returned as it is, since older kdctl wrote none.

    Raises SumError if the text is not the one that was written.
    """
    found = LAST.search(text)
    if found is None and '"sum":' not in text:
        return text
    plain = text[: found.start()] + END if found else ""
    if found is None or _hash(plain) != found[1]:
        raise SumError("its text is not the one that was written, as the sum in its last line says")
    return plain


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
