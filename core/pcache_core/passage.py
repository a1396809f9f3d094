"""What is encoded together: tokens, how they stand to each other, and which of them are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens that become one state.

    token_ids: all that are encoded.
    offsets: how far each stands behind the first, ascending; empty where they follow each other.
    stand_ins: which of them, by index, only stand where an argument will: the others see them,
        but they are no part of the state.
    """

    token_ids: tuple[int, ...]
    offsets: tuple[int, ...] = ()
    stand_ins: tuple[int, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the tokens that are part of the state."""
        dropped = set(self.stand_ins)
        return tuple(index for index in range(len(self.token_ids)) if index not in dropped)

    @property
    def kept_ids(self) -> tuple[int, ...]:
        """The tokens of the state."""
        if not self.stand_ins:
            return self.token_ids
        return tuple(self.token_ids[index] for index in self.kept)

    @property
    def extent(self) -> int:
        """Positions from the first token to behind the last."""
        return self.offsets[-1] + 1 if self.offsets else len(self.token_ids)

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """What the state is a function of beside its own tokens; empty for a plain text."""
        if not self.offsets and not self.stand_ins:
            return ()
        return (self.token_ids, self.offsets, self.stand_ins)

    def positions(self, first: int) -> Sequence[int]:
        """Of every token, the first one's given."""
        if not self.offsets:
            return range(first, first + len(self.token_ids))
        return [first + offset for offset in self.offsets]
