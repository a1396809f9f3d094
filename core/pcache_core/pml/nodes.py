"""The trees of PML: what a schema and a prompt say, without tokens and without positions.

All nodes are frozen and compare by what they say; `line` and `source` only serve messages. A tree
may be read from text (`parser.py`) or built in Python; `check.py` holds the rules for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from pcache_core.pml.source import Source

RoleName = Literal["system", "user", "assistant"]
ROLES: tuple[RoleName, ...] = get_args(RoleName)
DEFAULT_PARAM_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Text:
    """Plain characters, whatever they spell."""

    text: str
    line: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Param:
    """A place for an argument of up to `length` tokens.

    scaffold: text that stands there while the module is encoded; None for nothing.
    """

    name: str
    length: int = DEFAULT_PARAM_TOKENS
    scaffold: str | None = None
    line: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for any number of documents, together up to `max_tokens`; None for no limit."""

    name: str
    max_tokens: int | None = None
    line: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Scaffold:
    """Modules that are encoded together as well, for prompts that use all of them.

    modules: names in the scope where the scaffold stands, or paths below it (`trip/city`).
    """

    modules: tuple[str, ...]
    line: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Module:
    """Text that a prompt may use. cache: False computes it anew for every prompt."""

    name: str
    children: tuple[SchemaNode, ...] = ()
    cache: bool = True
    line: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Union:
    """Modules of which a prompt may use one; they share a start, the longest sets the length.

    scaffold: the member that a reference-style schema names as the default context. Modules are
        encoded independently here, so it is kept and changes nothing.
    """

    members: tuple[Module, ...]
    scaffold: str | None = None
    line: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Role:
    """A chat message of the schema. is_apart: whether white space stands beside its tags."""

    role: RoleName
    children: tuple[SchemaNode, ...] = ()
    line: int | None = field(default=None, compare=False, repr=False)
    is_apart: bool = field(default=False, compare=False, repr=False)


SchemaNode: TypeAlias = "Text | Param | Slot | Scaffold | Module | Union | Role"


@dataclass(frozen=True, slots=True)
class Schema:
    """What a family of prompts is made from. Its own text is part of every prompt."""

    name: str
    children: tuple[SchemaNode, ...] = ()
    line: int | None = field(default=None, compare=False, repr=False)
    source: Source | None = field(default=None, compare=False, repr=False)

    def __iter__(self) -> Iterator[SchemaNode]:
        """Yield every node, outer before inner."""
        return _below(self)


def children_of(node: Schema | SchemaNode) -> tuple[SchemaNode, ...]:
    """Return what a node holds itself; nothing for what only has a place."""
    if isinstance(node, Union):
        return node.members
    return node.children if isinstance(node, Schema | Module | Role) else ()


def _below(node: Schema | SchemaNode) -> Iterator[SchemaNode]:
    for child in children_of(node):
        yield child
        yield from _below(child)


@dataclass(frozen=True, slots=True)
class Document:
    """A document in a slot. name: what reports call it."""

    text: str
    name: str | None = None
    line: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ModuleUse:
    """A module that the prompt uses, or a slot that it fills: the schema says which.

    children: of a module, uses of the modules in it and text between them; of a slot, documents
        and text between them.
    """

    name: str
    arguments: Mapping[str, str] = field(default_factory=dict, hash=False)
    children: tuple[PromptNode, ...] = ()
    line: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Turn:
    """A chat message of the prompt: text and module uses.

    is_apart: whether white space stands beside its tags.
    """

    role: RoleName
    children: tuple[PromptNode, ...] = ()
    line: int | None = field(default=None, compare=False, repr=False)
    is_apart: bool = field(default=False, compare=False, repr=False)


PromptNode: TypeAlias = "Text | ModuleUse | Turn | Document"


@dataclass(frozen=True, slots=True)
class PromptTree:
    """One prompt: the modules it uses, their arguments, and its own text, turns and documents.

    schema: the schema's name. arguments: of parameters that stand in the schema itself.
    """

    schema: str
    children: tuple[PromptNode, ...] = ()
    arguments: Mapping[str, str] = field(default_factory=dict, hash=False)
    line: int | None = field(default=None, compare=False, repr=False)
    source: Source | None = field(default=None, compare=False, repr=False)
