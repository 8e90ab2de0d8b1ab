"""Where the weights of a PTQ student were in their cells when they were rounded: what training starts from.

One byte a weight, in a folder beside the student's, which is to be shipped without it.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from kdctl.base.errors import StoreError
from kdctl.formats.student import check_file, write_sums
from kdctl.model.folder import rows_of
from kdctl.model.rows import Span
from kdctl.quant.affine import QuantizedWeight
from kdctl.run.files import atomic_folder, naming, remove, writing
from kdctl.run.sums import listed_sums
from kdctl.system.distributed import ALONE

FILE = "offsets.safetensors"
OWNER = "identity"


def save_offsets(folder: Path, weights: Mapping[str, QuantizedWeight], owner: str) -> None:
    """Write the offsets that a method left of the student ``owner``; without any, remove those of another."""
    found = {name: weight.offsets.cpu() for name, weight in weights.items() if weight.offsets is not None}
    if not found:
        remove(folder)
        return
    with atomic_folder(folder) as temporary:
        with writing(temporary / FILE):
            save_file(found, temporary / FILE, {OWNER: owner})
        write_sums(temporary)


def offsets_sum(folder: Path, owner: str) -> str | None:
    """Return the sha256 of a student's offsets; None where there are none of it.

    Raises StoreError if they are damaged.
    """
    if not folder.exists():
        return None
    try:
        listed = listed_sums(folder)
        check_file(folder, FILE, listed)
    except StoreError as error:
        raise StoreError(
            f"{folder} is damaged, so training cannot start where the weights were when they were rounded; kdctl "
            "quantize --force makes student and offsets again, and without the folder training starts in the middle of "
            "their cells"
        ) from error
    with naming(folder / FILE), safe_open(folder / FILE, "pt") as file:
        return listed[FILE] if (file.metadata() or {}).get(OWNER) == owner else None


def with_offsets(
    folder: Path, weights: Mapping[str, QuantizedWeight], owner: str, span: Span = ALONE.span
) -> dict[str, QuantizedWeight]:
    """Return a student's weights with their offsets, as they are where there are none of it.

    span: tells which of so many rows the weights are. Raises StoreError if they are damaged.
    """
    if offsets_sum(folder, owner) is None:
        return dict(weights)
    with naming(folder / FILE), safe_open(folder / FILE, "pt") as file:
        rows = {name: span(file.get_slice(name).get_shape()[0]) for name in weights}
        return {
            name: replace(weight, offsets=rows_of(file, name, rows[name]).to(weight.codes.device))
            for name, weight in weights.items()
        }
