"""What names the chunks of a state on a server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pcache_core.errors import StateMismatchError

CHUNK_BYTES = 2**20
_MANIFEST = re.compile(rb"([0-9a-f]{16}):([1-9][0-9]{0,6}):([1-9][0-9]{0,12})")


@dataclass(frozen=True, slots=True)
class Manifest:
    """Names the chunks of a state. writing: tells one writing of it from another."""

    writing: str
    chunks: int
    nbytes: int

    @staticmethod
    def parse(text: bytes) -> Manifest:
        """Raises: StateMismatchError: not a manifest."""
        match = _MANIFEST.fullmatch(text)
        if match is None:
            raise StateMismatchError("its manifest is not as it was written")
        manifest = Manifest(match[1].decode(), int(match[2]), int(match[3]))
        if manifest.chunks != -(-manifest.nbytes // CHUNK_BYTES):
            raise StateMismatchError("its manifest contradicts itself")
        return manifest

    def text(self) -> str:
        """As it is kept; `parse` reads it."""
        return f"{self.writing}:{self.chunks}:{self.nbytes}"

    def names(self, name: str) -> Iterator[str]:
        """Of the chunks of the state of that name, in order."""
        return (f"{name}:{self.writing}:{index}" for index in range(self.chunks))
