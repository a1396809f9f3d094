"""What the header of a GGUF file says: its metadata, and where each tensor lies."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pcache_core.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_MOST_NUMBERS = 4096  # of an array that is kept; longer ones are scores and types of tokens
_MOST_DIMENSIONS = 8
_F32 = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """shape: as torch has it. kind: ggml's number for its type. offset: from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """metadata: by key; lists of strings and long lists of numbers are left out."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        """The family, in llama.cpp's words."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str) -> Any:
        """Return a value of the architecture's own, such as `context_length`; None without one."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def numbers(self, name: str) -> NDArray[np.float32] | None:
        """Return a small tensor's numbers; None where the file has none of that name in fp32."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.kind != _F32:
            return None
        return np.fromfile(self.path, np.float32, tensor.elements, offset=tensor.offset)


def read_header(path: Path) -> Header:
    """Read a file's header. Raises: ModelError: it is damaged, cut, in parts, or no GGUF."""
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error


def long_list(data: memoryview, offset: int, kind: int) -> tuple[int, int] | None:
    """Return the length of the list at `offset` of a file, and its bytes; None unless it is long.

    kind: what stands there, in GGUF's numbers.
    """
    if kind != _ARRAY:
        return None
    item, count = struct.unpack_from("<IQ", data, offset)
    if count <= _MOST_NUMBERS:
        return None
    end = offset + struct.calcsize("<IQ")
    if item != _STRING:
        return count, end + count * struct.calcsize(_FORMATS[item]) - offset
    length = struct.Struct("<Q")
    for _ in range(count):
        end += length.size + length.unpack_from(data, end)[0]
    return count, end - offset


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = path.stat().st_size

    def header(self) -> Header:
        if self._file.read(4) != _MAGIC:
            raise ModelError(f"{self._path} is not a GGUF file: it does not begin with 'GGUF'")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ModelError(
                f"{self._path} is GGUF of version {version}; versions 2 and 3 can be read. Convert "
                "the model again with a current llama.cpp"
            )
        num_tensors, num_values = self._number("Q"), self._number("Q")
        metadata = dict(self._pair() for _ in range(num_values))
        if not isinstance(metadata.get("general.architecture"), str):
            raise ModelError(f"{self._path} does not say of what architecture its model is")
        parts = metadata.get("split.count", 1)
        if parts > 1:
            raise ModelError(
                f"{self._path} is one of {parts} parts of a model; join them into one file with "
                "`llama-gguf-split --merge FIRST-PART OUTPUT`, and give that"
            )
        entries = [self._tensor() for _ in range(num_tensors)]
        alignment = max(int(metadata.get("general.alignment", 32)), 1)
        start = -(-self._file.tell() // alignment) * alignment
        tensors = {t.name: Tensor(t.name, t.shape, t.kind, start + t.offset) for t in entries}
        for tensor in tensors.values():
            self._check_inside(tensor)
        return Header(self._path, metadata, tensors)

    def _check_inside(self, tensor: Tensor) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            per_block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        except (KeyError, ValueError):
            raise ModelError(
                f"{self._path} stores {tensor.name} in a way (ggml type {tensor.kind}) that the "
                "gguf package can't read; upgrade it, or take another quantisation of the model"
            ) from None
        if tensor.offset + tensor.elements // per_block * num_bytes > self._size:
            raise self._cut()

    def _cut(self) -> ModelError:
        return ModelError(
            f"{self._path} is cut or damaged: its {self._size:,} bytes end before what its header "
            "lists; copy or download it again"
        )

    def _bytes(self, count: int) -> bytes:
        found = self._file.read(count) if count <= self._size else b""
        if len(found) < count:
            raise self._cut()
        return found

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(form)))[0]

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", "replace")

    def _pair(self) -> tuple[str, Any]:
        key, kind = self._string(), self._number("I")
        if kind == _STRING:
            return key, self._string()
        return key, self._array() if kind == _ARRAY else self._number(self._form(kind))

    def _form(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise self._cut()
        return _FORMATS[kind]

    def _array(self) -> list[Any] | None:
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            for _ in range(count):
                self._bytes(self._number("Q"))
            return None
        form = self._form(kind)
        found = self._bytes(count * struct.calcsize(form))
        return list(struct.unpack(f"<{count}{form}", found)) if count <= _MOST_NUMBERS else None

    def _tensor(self) -> Tensor:
        name, dimensions = self._string(), self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._cut()
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        return Tensor(name, shape, self._number("I"), self._number("Q"))
