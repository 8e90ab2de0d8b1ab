"""The weights that a model folder holds, read without building the model."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdctl.base.errors import ModelError, brief
from kdctl.model.absent import check_fetched, check_no_adapter, why_no_weights
from kdctl.model.stops import GENERATION
from kdctl.run.hashes import known_sha256

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that transformers loads, by name: model.safetensors, or those that the index names.

    Raises ModelError if there are none, and if one is missing, damaged, or not what the index says.
    """
    check_no_adapter(folder)
    if (folder / SINGLE).is_file():
        stored_names(folder / SINGLE)
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ModelError(why_no_weights(folder))
    return _indexed(folder)


def stored_names(path: Path) -> list[str]:
    """Return the names of a file's tensors, in its own order."""
    return list(open_tensors(path).keys())


def open_tensors(path: Path) -> Any:
    """Open a safetensors file. Raises ModelError if it is not fetched, cut or damaged."""
    check_fetched(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(
            f"{path} cannot be read as safetensors: {brief(error)}; it is incomplete or damaged, fetch it again"
        ) from None


def _indexed(folder: Path) -> list[Path]:
    """List the files that an index names, each with the tensors that it says."""
    named: dict[str, set[str]] = {}
    for tensor, file in _weight_map(folder / INDEX).items():
        named.setdefault(file, set()).add(tensor)
    seen: dict[str, str] = {}
    for file, tensors in sorted(named.items()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{folder / INDEX} names {file!r}, which is no .safetensors file of its folder")
        if not (folder / file).is_file():
            raise ModelError(f"{folder / INDEX} names {file}, which is not there; fetch the model again")
        held = stored_names(folder / file)
        _check_held(folder, file, sorted(tensors - set(held)), [name for name in held if name in seen])
        seen |= dict.fromkeys(held, file)
    return [folder / file for file in sorted(named)]


def _check_held(folder: Path, file: str, missing: list[str], twice: list[str]) -> None:
    if missing:
        raise ModelError(f"{folder / INDEX}: {missing[0]} is not in {file}, as it says; fetch the model again")
    if twice:
        raise ModelError(f"{folder}: {twice[0]} is in {file} and in another file of the index; fetch the model again")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = index["weight_map"]
        if found and isinstance(index["metadata"], dict) and all(isinstance(file, str) for file in found.values()):
            return found
        why = "its metadata or its weight_map is no list of tensors and files"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {brief(error)}"
    raise ModelError(f"{path} cannot be read as an index of weights: {why}; fetch it again") from None


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a folder's safetensors files by name."""
    for path in weight_files(folder):
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not iterable
                yield name, file.get_tensor(name)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name; each is read when it is asked for, and not kept.

    renamed: tells the name that a stored one is known by.
    """

    def __init__(self, folder: Path, renamed: Callable[[str], str] = str):
        files = [open_tensors(path) for path in weight_files(folder)]
        self._places = {renamed(name): (file, name) for file in files for name in file.keys()}  # noqa: SIM118 - safe_open is not iterable

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        return file.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        file, stored = self._places[name]
        return tuple(file.get_slice(stored).get_shape())

    def rows(self, name: str, rows: slice) -> Tensor:
        """Read some rows of a tensor."""
        return rows_of(*self._places[name], rows)


def rows_of(file: Any, name: str, rows: slice) -> Tensor:
    """Read some rows, maybe none, of a tensor of an open safetensors file."""
    stored = file.get_slice(name)
    return stored[rows] if rows.stop > rows.start else stored[:1][:0]


def fingerprint(folder: Path) -> str:
    """Hash a model folder's configuration, stop tokens and weights, 64 hex digits."""
    total = hashlib.sha256()
    generation = [folder / GENERATION] if (folder / GENERATION).is_file() else []
    for path in [folder / "config.json", *generation, *weight_files(folder)]:
        total.update(f"{path.name}:{known_sha256(path)}\n".encode())
    return total.hexdigest()


def weights_bytes(folder: Path) -> int:
    """Return the size of a folder's weights as one safetensors file, however many files they are cut into."""
    files = weight_files(folder)
    if len(files) == 1:
        return files[0].stat().st_size
    headers = [_header(path) for path in files]
    merged: dict[str, Any] = {"__metadata__": headers[0].get("__metadata__", {"format": "pt"})}
    place = 0
    for name, tensor in sorted(
        (item for header in headers for item in header.items() if item[0] != "__metadata__"),
        key=lambda item: (-_item_bits(item[1]), item[0]),
    ):
        start, end = tensor["data_offsets"]
        merged[name] = tensor | {"data_offsets": [place, place := place + end - start]}
    header = len(json.dumps(merged, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header // 8) * 8 + place


def _header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def _item_bits(tensor: dict[str, Any]) -> int:
    """Return the width of one number; wide ones come first in a file."""
    return int("".join(filter(str.isdigit, tensor["dtype"].partition("_")[0])) or 8)
