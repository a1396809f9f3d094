"""A schema with positions: the values that `layout.py` makes and `resolve.py` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from pcache_core.pml.nodes import RoleName, Schema

ModulePath: TypeAlias = tuple[str, ...]
Tokenise: TypeAlias = Callable[[str], Sequence[int]]
"""Ids of a text, special tokens that it spells as plain characters."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a chat template puts between two messages."""

    text: str
    token_ids: tuple[int, ...]


Marks: TypeAlias = Callable[[RoleName | None, RoleName | None], Mark | None]
"""The mark behind a message of one role (None: before all) and before one of another (None: before
the answer). None where the template has no such sequence."""


def no_marks(before: RoleName | None, after: RoleName | None) -> Mark | None:
    """For models without a chat template: messages follow each other bare."""
    return Mark("", ())


@dataclass(frozen=True, slots=True, eq=False)
class PlacedRole:
    """A message of the schema. start: of its mark, for which `reserved` positions are kept."""

    role: RoleName
    start: int
    reserved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """owner: path of the module it belongs to, () for the schema itself. start: first position."""

    owner: ModulePath
    start: int
    role: PlacedRole | None
    line: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedText(_Placed):
    """A run of text. cached: whether its state may be reused (`cache="false"` and below: no)."""

    text: str
    token_ids: tuple[int, ...]
    cached: bool

    @property
    def stop(self) -> int:
        """One behind the last position."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedParam(_Placed):
    """A parameter: positions `start … stop`. scaffold_ids: what stands there during encoding."""

    name: str
    length: int
    scaffold_ids: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One behind the last position."""
        return self.start + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedSlot(_Placed):
    """A slot. max_tokens: None for no limit, which keeps no positions."""

    name: str
    max_tokens: int | None

    @property
    def stop(self) -> int:
        """One behind the last position."""
        return self.start + (self.max_tokens or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModule(_Placed):
    """A module and everything in it, in order. owner: the path of the module around it.

    union: a number that the members of one union share, else None.
    """

    name: str
    stop: int
    cached: bool
    union: int | None
    items: tuple[PlacedItem, ...]

    @property
    def path(self) -> ModulePath:
        """The names that lead here; () for the schema."""
        return (*self.owner, self.name) if self.name else ()


PlacedItem: TypeAlias = PlacedText | PlacedParam | PlacedSlot | PlacedModule


@dataclass(frozen=True, slots=True)
class Layout:
    """A schema with positions. root: the schema's own text, parameters, slots and modules.

    scaffolds: paths of modules that are encoded together as well. tokenise, marks: what it was
    laid out with; prompts are resolved with the same.
    """

    schema: Schema
    root: PlacedModule
    scaffolds: tuple[tuple[ModulePath, ...], ...]
    tokenise: Tokenise = field(compare=False, repr=False)
    marks: Marks = field(compare=False, repr=False)

    @property
    def start(self) -> int:
        """The first position."""
        return self.root.start

    @property
    def stop(self) -> int:
        """One behind the last position; the schema's length if it starts at 0."""
        return self.root.stop

    def modules(self) -> Iterator[PlacedModule]:
        """Every module, outer before inner, without the schema itself."""
        return (item for item in _walk(self.root) if isinstance(item, PlacedModule))

    def runs(self) -> Iterator[PlacedText | PlacedParam]:
        """Every run of text and every parameter, in the schema's order."""
        return (item for item in _walk(self.root) if isinstance(item, PlacedText | PlacedParam))

    def module(self, path: Sequence[str]) -> PlacedModule:
        """The module of a path. Raises: KeyError: there is none."""
        found = self.root
        for name in path:
            inside = {item.name: item for item in found.items if isinstance(item, PlacedModule)}
            found = inside[name]
        return found


def _walk(module: PlacedModule) -> Iterator[PlacedItem]:
    for item in module.items:
        yield item
        if isinstance(item, PlacedModule):
            yield from _walk(item)
