"""What a state is made from, and which rows of a prompt it is to fill. Pure records."""

from __future__ import annotations

from dataclasses import dataclass

from pcache_core.kv.key import ModuleKey
from pcache_core.prompt import Passage

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
