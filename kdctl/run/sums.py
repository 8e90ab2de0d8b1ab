"""``SHA256SUMS``: what a folder says of each of its files, in the format of the sha256sum command."""

from pathlib import Path

from kdctl.base.errors import StoreError
from kdctl.run.files import read_bytes
from kdctl.run.record_files import remedy

SUMS = "SHA256SUMS"


def listed_sums(folder: Path) -> dict[str, str]:
    """Return what SHA256SUMS says of each file. Raises StoreError if it is missing, or names a file elsewhere."""
    sums = folder / SUMS
    if not sums.is_file():
        raise StoreError(f"{folder} has no {SUMS}: it is unfinished or not a student folder; {remedy(sums)}")
    lines = read_bytes(sums).decode(errors="replace").splitlines()
    listed = {name: expected for expected, _, name in (line.partition("  ") for line in lines)}
    for name in listed:
        inside = name.isprintable() and not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not Path(name).name:
            raise StoreError(f"{sums} is damaged: it names {name!r}, which is no file of the folder; {remedy(sums)}")
    return listed
