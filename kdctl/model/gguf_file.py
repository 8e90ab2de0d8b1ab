"""A GGUF file: its fields and tensors, read strictly. What the header promises lies inside the file, or it is refused.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import torch
from torch import Tensor

from kdctl.base.errors import ModelError

Kind = gguf.GGMLQuantizationType
T = TypeVar("T")
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
SMALLEST_FIELD, SMALLEST_TENSOR = 13, 24
"""Bytes: no count in the header can be larger than what is left of the file, divided by these."""


_Description = tuple[Kind, tuple[int, ...], int]
"""Kind, shape and offset of a tensor, as the header has them."""


class _Damaged(ValueError):
    """What the file says cannot be so."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. shape: rows first. start: bytes from the start of the file."""

    kind: Kind
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """The fields of a GGUF file by key, and where its tensors are by name."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """Name the network, as llama.cpp does."""
        return str(self.fields["general.architecture"])

    def field(self, key: str, kind: type[T]) -> T | None:
        """Return the value of a key, None if it is not there. Raises ModelError if it is of another kind."""
        value = self.fields.get(key)
        if value is not None and type(value) is not kind:
            raise ModelError(f"{self.path}: {key}={value!r:.80} is of another kind than {kind.__name__}")
        return value

    def read(self, name: str) -> Tensor:
        """Dequantize one tensor to float32, as the package of the format does."""
        stored = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, stored.size, offset=stored.start)
        rows = data.reshape(*stored.shape[:-1], -1)
        try:
            return torch.from_numpy(gguf.dequantize(rows, stored.kind).copy()).reshape(stored.shape)
        except NotImplementedError:
            raise ModelError(f"{self.path}: {name} is stored as {stored.kind.name}, which is not read") from None


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises ModelError if the file is cut, its header is damaged, or a tensor does not lie inside it.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            fields, tensors = _header(_Cursor(data))
    except (ValueError, OSError, struct.error) as error:  # an empty file cannot be mapped: ValueError
        raise ModelError(
            f"{path} cannot be read as a GGUF model: {error}; the file is incomplete or damaged, fetch it again"
        ) from None
    return GgufFile(path, fields, tensors)


class _Cursor:
    """A place in the file, from which values are read one after the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        """Read numbers, little-endian."""
        found = struct.unpack_from(f"<{layout}", self.data, self.place)
        self.place += struct.calcsize(f"<{layout}")
        return found

    def count(self, smallest: int, layout: str = "Q") -> int:
        """Read how many items of at least ``smallest`` bytes follow."""
        (number,) = self.take(layout)
        if number * smallest > len(self.data) - self.place:
            raise _Damaged(f"{number} items are announced at byte {self.place}, more than the file holds")
        return number

    def text(self) -> str:
        length = self.count(1)
        found = self.data[self.place : self.place + length].decode("utf-8")
        self.place += length
        return found


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if cursor.data[:4] != b"GGUF":
        raise _Damaged("it does not begin with the letters GGUF")
    cursor.place = 4
    (version,) = cursor.take("I")
    if version not in VERSIONS:
        raise _Damaged(f"version {version} of the format is not read (big-endian files are not either)")
    tensors, fields = cursor.count(SMALLEST_TENSOR), cursor.count(SMALLEST_FIELD)
    found = _named("key", (_field(cursor) for _ in range(fields)))
    if not isinstance(found.get("general.architecture"), str):
        raise _Damaged("general.architecture is missing")
    described = _named("tensor", (_description(cursor) for _ in range(tensors)))
    return found, _placed(described, cursor, found.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))


def _named(what: str, items: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in items:
        if name in found:
            raise _Damaged(f"the {what} {name} is there twice")
        found[name] = value
    return found


def _field(cursor: _Cursor) -> tuple[str, Any]:
    return cursor.text(), _value(cursor, cursor.take("I")[0])


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in SCALARS:
        return cursor.take(SCALARS[kind])[0]
    if kind == STRING:
        return cursor.text()
    if kind != ARRAY:
        raise _Damaged(f"a value of the unknown kind {kind} before byte {cursor.place}")
    (of,) = cursor.take("I")
    if of == STRING:
        return [cursor.text() for _ in range(cursor.count(8))]
    if of not in SCALARS:
        raise _Damaged(f"an array of the unknown kind {of} before byte {cursor.place}")
    number = cursor.count(struct.calcsize(f"<{SCALARS[of]}"))
    return list(cursor.take(f"{number}{SCALARS[of]}"))


def _description(cursor: _Cursor) -> tuple[str, _Description]:
    name, dimensions = cursor.text(), cursor.count(8, "I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise _Damaged(f"the tensor {name} has {dimensions} dimensions")
    shape = tuple(reversed(cursor.take(f"{dimensions}Q")))
    kind, offset = cursor.take("IQ")
    if kind not in {each.value for each in Kind}:
        raise _Damaged(f"the tensor {name} is of the unknown kind {kind}")
    return name, (Kind(kind), shape, offset)


def _placed(described: Mapping[str, _Description], cursor: _Cursor, alignment: Any) -> dict[str, StoredTensor]:
    """Find where each tensor lies; each must lie inside the file, on the alignment, and on no other tensor."""
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment={alignment!r} is no power of two")
    start = -(-cursor.place // alignment) * alignment
    found = {}
    for name, (kind, shape, offset) in described.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise _Damaged(f"the tensor {name} of shape {shape} is not made of {kind.name} blocks")
        found[name] = StoredTensor(kind, shape, start + offset, math.prod(shape) // block * block_bytes)
        if offset % alignment or found[name].start + found[name].size > len(cursor.data):
            raise _Damaged(f"the tensor {name} does not lie inside the file")
    _check_apart(found)
    return found


def _check_apart(tensors: Mapping[str, StoredTensor]) -> None:
    end = 0
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].start):
        if stored.start < end:
            raise _Damaged(f"the tensor {name} lies on another one")
        end = stored.start + stored.size
