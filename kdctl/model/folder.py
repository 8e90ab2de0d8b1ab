"""The weights that a model folder holds, read without building the model."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from kdctl.base.errors import ModelError
from kdctl.model.hashes import known_sha256
from kdctl.model.stops import GENERATION


def weight_files(folder: Path) -> list[Path]:
    """List a folder's safetensors files. Raises ModelError if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no .safetensors file; kdctl does not open pickled weights")
    return files


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a folder's safetensors files by name."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not iterable
                yield name, file.get_tensor(name)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name; each is read when it is asked for, and not kept."""

    def __init__(self, folder: Path):
        files = [safe_open(path, framework="pt") for path in weight_files(folder)]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - safe_open is not iterable

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def fingerprint(folder: Path) -> str:
    """Hash a model folder's configuration, stop tokens and weights, 64 hex digits."""
    total = hashlib.sha256()
    generation = [folder / GENERATION] if (folder / GENERATION).is_file() else []
    for path in [folder / "config.json", *generation, *weight_files(folder)]:
        total.update(f"{path.name}:{known_sha256(path)}\n".encode())
    return total.hexdigest()


def weights_bytes(folder: Path) -> int:
    """Add up the sizes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in weight_files(folder))
