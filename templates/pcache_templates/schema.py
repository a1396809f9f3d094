"""The tree that a template is made into, and its place names.

A schema holds modules, unions, slots and roles; a module holds either text and parameters, or more
modules. Every text and parameter remembers its `origin`, the place in the template that writes it,
so that rendered text finds the module it belongs to.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

# A place in a template: the way to it from the outside in, for example (macro call, text 3).
Path = tuple[Hashable, ...]
ValueKind = Literal["argument", "document"]

DEFAULT_PARAM_TOKENS = 64
# As many elements as PML may have. Macros that call macros could write many more.
MAX_NODES = 20_000


@dataclass(frozen=True, slots=True)
class Text:
    """Template text, the same in every prompt that takes the branch it is in."""

    text: str
    origin: Path = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Param:
    """A value that is filled in. length: the most tokens it may have.

    kind: `document` if the value is one of many that a loop goes through.
    """

    name: str
    length: int = DEFAULT_PARAM_TOKENS
    kind: ValueKind = field(default="argument", compare=False)
    origin: Path = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Module:
    """A part of the template that a prompt has, or has not."""

    name: str
    children: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Union:
    """Modules of which a prompt has one at the most."""

    members: tuple[Module, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for any number of parts, such as what a loop writes.

    body: what is written there each time.
    """

    name: str
    body: tuple[Node, ...] = ()
    origin: Path = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Role:
    """A chat turn: `system`, `user` or `assistant`."""

    name: str
    children: tuple[Node, ...]


Node = Text | Param | Module | Union | Slot | Role


class Place(NamedTuple):
    """What the schema calls a place in the template.

    param: None for the module's own text. slot: the one that the place is written into.
    """

    module: str
    param: str | None = None
    kind: ValueKind = "argument"
    slot: str | None = None


@dataclass(frozen=True, slots=True)
class Schema:
    """A family of prompts. Made by a template's `schema`."""

    name: str
    children: tuple[Node, ...]
    places: Mapping[Path, Place] = field(default_factory=dict, compare=False, repr=False)

    def __iter__(self) -> Iterator[Node]:
        """Every node, parents before their children."""
        return walk(self.children)


def children_of(node: Node) -> tuple[Node, ...]:
    """What a node holds; nothing for text and parameters."""
    match node:
        case Module() | Role():
            return node.children
        case Union():
            return node.members
        case Slot():
            return node.body
        case _:
            return ()


def walk(nodes: Iterable[Node]) -> Iterator[Node]:
    """Every node below, parents before their children."""
    for node in nodes:
        yield node
        yield from walk(children_of(node))


def are_too_many(nodes: Iterable[Node]) -> bool:
    """Whether there are more nodes than a schema may have."""
    return next(islice(walk(nodes), MAX_NODES, None), None) is not None
