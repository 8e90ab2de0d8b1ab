"""Names that stand in files: none of them leads out of the folder that it is a name in."""

from pathlib import Path, PurePosixPath

from kdctl.base.errors import StoreError


def stays_inside(name: str) -> bool:
    """Tell whether a name leads to a file in the folder that it is joined to, or below it."""
    path = PurePosixPath(name)
    within = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return within and name.isprintable() and "\\" not in name


def inside(folder: Path, name: str) -> Path:
    """Return the path of a name in a folder. Raises StoreError for one that leads elsewhere, or nowhere."""
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise StoreError(
            f"the name {name!a} in {folder} is not UTF-8, or the locale is another; set LC_ALL=C.UTF-8, or rename it"
        )
    if not stays_inside(name):
        raise StoreError(
            f"{name!r} cannot be the name of a file in {folder}: it leads elsewhere, and what a file says is read "
            "in its own folder only; the file that says so is damaged, or was changed by somebody"
        )
    return folder / name
