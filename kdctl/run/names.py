"""Names that stand in files: none of them leads out of the folder that it is a name in."""

from pathlib import Path, PurePosixPath

from kdctl.base.errors import StoreError


def inside(folder: Path, name: str) -> Path:
    """Return the path of a name in a folder. Raises StoreError for one that leads elsewhere, or nowhere."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or not name.isprintable() or "\\" in name:
        raise StoreError(
            f"{name!r} cannot be the name of a file in {folder}: it leads elsewhere, and what a file says is read "
            "in its own folder only; the file that says so is damaged, or was changed by somebody"
        )
    return folder / path
