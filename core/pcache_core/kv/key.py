"""What a state is made from, which rows it fills, and its name: a digest of all it depends on."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pcache_core.params import check_namespace
from pcache_core.prompt import Passage

FORMAT_VERSION = 2


def digest(fields: Iterable[bytes]) -> str:
    """SHA-256 over length-prefixed fields, as hex: no two field lists share an input."""
    sha = hashlib.sha256()
    for content in fields:
        sha.update(struct.pack("<Q", len(content)))
        sha.update(content)
    return sha.hexdigest()


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int64."""
    return struct.pack(f"<{len(token_ids)}q", *token_ids)


@dataclass(frozen=True, slots=True)
class KeySpace:
    """Makes the keys of one model in one namespace.

    model: fingerprint of configuration and weights. dtype: of the states.
    model_name, decode: no part of any key; a store that lasts notes the name and the text's start,
        so that people can tell its states apart.
    Raises: OptionError: the namespace has other characters than letters, digits and `._-`.
    """

    model: str
    dtype: str
    namespace: str
    model_name: str = field(default="", compare=False)
    decode: Callable[[Sequence[int]], str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_namespace(self.namespace)

    def key(
        self,
        preamble_ids: Sequence[int],
        token_ids: Sequence[int],
        position: int | None,
        shape: Sequence[Sequence[int]] = (),
    ) -> ModuleKey:
        """Key of `token_ids` encoded after `preamble_ids`.

        position: of the first token, for models that can't relocate; None where it does not matter.
        shape: how the tokens were encoded other than one after the other, see `Passage.shape`.
        """
        fields = (
            str(FORMAT_VERSION).encode(),
            self.model.encode(),
            self.dtype.encode(),
            self.namespace.encode(),
            pack_ids(preamble_ids),
            pack_ids(token_ids),
            b"any" if position is None else str(position).encode(),
            *(pack_ids(part) for part in shape),
        )
        return ModuleKey(
            digest(fields),
            tuple(token_ids),
            self,
            preamble_ids=tuple(preamble_ids),
            position=position,
        )


@dataclass(frozen=True, slots=True)
class ModuleKey:
    """Names a state in a store.

    digest: 64 hex digits over format version, model, dtype, namespace, preamble, tokens, where the
        model can't relocate the position, and gaps if the tokens were encoded with any.
    token_ids: compared with the stored ones on every hit.
    space, preamble_ids, position: what the digest was made of, for stores that note it beside the
        state; None and empty where the key was not made by a `KeySpace`.
    """

    digest: str
    token_ids: tuple[int, ...]
    space: KeySpace | None = field(default=None, compare=False, repr=False)
    preamble_ids: tuple[int, ...] = field(default=(), compare=False, repr=False)
    position: int | None = field(default=None, compare=False, repr=False)


RowRange = tuple[int, int]
"""Rows `start … stop`."""


@dataclass(frozen=True, slots=True)
class ModuleTokens:
    """A passage to encode: the tokens that it is encoded after, and its first token's position."""

    passage: Passage
    preamble_ids: tuple[int, ...]
    position: int

    @property
    def num_tokens(self) -> int:
        """Tokens to run through the model, those included that only stand in for others."""
        return len(self.passage.token_ids)

    @property
    def end(self) -> int:
        """One after the last position."""
        return self.position + self.passage.extent


@dataclass(frozen=True, slots=True)
class PlannedState:
    """Rows of a prompt that one state fills.

    module: what the state is encoded from. key: names it in the store.
    runs: row ranges, in the order of the state's tokens. positions: of each run's first row; those
        of a run have no gap.
    is_opening: it is the prompt's constant opening, an exact prefix that is encoded after nothing.
    """

    module: ModuleTokens
    key: ModuleKey
    runs: tuple[RowRange, ...]
    positions: tuple[int, ...]
    is_opening: bool = False

    @property
    def start(self) -> int:
        """The first row."""
        return min(start for start, _ in self.runs)

    @property
    def position(self) -> int:
        """Where the state's first token stands in the prompt."""
        return self.positions[0]

    @property
    def stop(self) -> int:
        """One after the last row; other rows may lie between."""
        return max(stop for _, stop in self.runs)

    @property
    def num_rows(self) -> int:
        """Rows that the state fills."""
        return sum(stop - start for start, stop in self.runs)
