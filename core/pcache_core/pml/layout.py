"""Where everything of a schema stands: absolute positions, as in the paper. Pure.

A schema is laid out once, from its first position on, in its own order. Text takes its tokens,
a parameter its length, a slot its `max_tokens`, a union the longest of its modules, which all
start where the union does (arXiv 2311.04934, section 3.3). Chat messages begin with their mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

from pcache_core.pml.check import check_schema
from pcache_core.pml.nodes import (
    Module,
    Param,
    Role,
    RoleName,
    Scaffold,
    Schema,
    SchemaNode,
    Slot,
    Text,
    Union,
)
from pcache_core.pml.source import error_at, quoted

ModulePath: TypeAlias = tuple[str, ...]
Tokenise: TypeAlias = Callable[[str], Sequence[int]]
"""Ids of a text, special tokens that it spells as plain characters."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a chat template puts between two messages."""

    text: str
    token_ids: tuple[int, ...]


Marks: TypeAlias = Callable[[RoleName | None, RoleName | None], Mark | None]
"""The mark after a message of one role (None: before all) and before one of another (None: before
the answer). None where the template has no such sequence."""


def no_marks(before: RoleName | None, after: RoleName | None) -> Mark | None:
    """Let messages follow each other bare, for models without a chat template."""
    return Mark("", ())


@dataclass(frozen=True, slots=True, eq=False)
class PlacedRole:
    """A message of the schema. start: of its mark, for which `reserved` positions are kept.

    is_apart: whether white space stands beside its tags.
    """

    role: RoleName
    start: int
    reserved: int
    is_apart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """Something of a schema at the positions `start … stop`, `stop` not among them.

    owner: path of the module it belongs to, () for the schema itself.
    """

    owner: ModulePath
    role: PlacedRole | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedText(_Placed):
    """A run of text. cached: whether its state may be reused (`cache="false"` and below: no)."""

    text: str
    token_ids: tuple[int, ...]
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedParam(_Placed):
    """A parameter of `length` tokens. scaffold_ids: what stands there during encoding."""

    name: str
    length: int
    scaffold_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedSlot(_Placed):
    """A slot. max_tokens: None for no limit, which keeps no positions."""

    name: str
    max_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModule(_Placed):
    """A module and everything in it, in order. owner: the path of the module around it.

    union: a number that the members of one union share, else None.
    """

    name: str
    cached: bool
    union: int | None
    items: tuple[PlacedItem, ...]

    @property
    def path(self) -> ModulePath:
        """The names that lead here; () for the schema."""
        return (*self.owner, self.name) if self.name else ()


PlacedItem: TypeAlias = PlacedText | PlacedParam | PlacedSlot | PlacedModule


@dataclass(frozen=True)
class SchemaLayout:
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
        """One after the last position; the schema's length if it starts at 0."""
        return self.root.stop

    def modules(self) -> Iterator[PlacedModule]:
        """Yield every module, outer before inner, without the schema itself."""
        return _modules_in(self.root)

    def module(self, path: Sequence[str]) -> PlacedModule:
        """Return the module of a path. Raises: KeyError: there is none."""
        return self._by_path[tuple(path)]

    @cached_property
    def _by_path(self) -> dict[ModulePath, PlacedModule]:
        return {module.path: module for module in (self.root, *self.modules())}


def _modules_in(module: PlacedModule) -> Iterator[PlacedModule]:
    for item in module.items:
        if isinstance(item, PlacedModule):
            yield item
            yield from _modules_in(item)


def place(
    schema: Schema, tokenise: Tokenise, *, marks: Marks = no_marks, first_position: int = 0
) -> SchemaLayout:
    """Give every text, parameter, slot and module of a schema its absolute positions.

    tokenise: each text is tokenised alone. marks: of the model's chat template.
    first_position: after whatever precedes every prompt, such as a beginning-of-sequence token.
    Raises: PMLError: the schema breaks a rule; a parameter's scaffold is longer than its length.
    """
    check_schema(schema)
    placer = _Placer(schema, tokenise, marks, first_position)
    root = placer.module(Module("", schema.children), _Scope(), None)
    return SchemaLayout(schema, root, tuple(placer.scaffolds), tokenise, marks)


@dataclass(frozen=True, slots=True)
class _Scope:
    """Where in the schema the placer is."""

    path: ModulePath = ()
    cached: bool = True
    role: PlacedRole | None = None


class _Placer:
    """Walks a schema in order.

    `_position` is where the next thing starts; `_previous` holds the roles that the message before
    it may have, None for no message.
    """

    def __init__(
        self, schema: Schema, tokenise: Tokenise, marks: Marks, first_position: int
    ) -> None:
        self.scaffolds: list[tuple[ModulePath, ...]] = []
        self._schema, self._tokenise, self._marks = schema, tokenise, marks
        self._position = first_position
        self._previous: frozenset[RoleName | None] = frozenset([None])
        self._unions = 0

    def module(self, node: Module, scope: _Scope, union: int | None) -> PlacedModule:
        """Place a module; the schema itself as one without a name."""
        start, before = self._position, self._previous
        path = (*scope.path, node.name) if node.name else ()
        inside = replace(scope, path=path, cached=scope.cached and node.cache)
        items = tuple(self._items(node.children, inside))
        self._previous |= before  # a prompt may leave it out
        return PlacedModule(
            owner=scope.path, role=scope.role, start=start, stop=self._position,
            name=node.name, cached=inside.cached, union=union, items=items,
        )  # fmt: skip

    def _items(self, children: Sequence[SchemaNode], scope: _Scope) -> Iterator[PlacedItem]:
        for node in children:
            match node:
                case Module():
                    yield self.module(node, scope, None)
                case Union():
                    yield from self._union(node, scope)
                case Role():
                    yield from self._role(node, scope)
                case Scaffold():
                    paths = (tuple(name.split("/")) for name in node.modules)
                    self.scaffolds.append(tuple((*scope.path, *path) for path in paths))
                case _:
                    item = self._leaf(node, scope)
                    self._position = item.stop
                    if scope.role is None:  # beside messages, it is the user's (see resolve.py)
                        self._previous |= {"user"}
                    yield item

    def _leaf(self, node: Text | Param | Slot, scope: _Scope) -> PlacedItem:
        owner, role, start = scope.path, scope.role, self._position
        match node:
            case Text(text):
                ids = tuple(self._tokenise(text))
                return PlacedText(
                    owner=owner, role=role, start=start, stop=start + len(ids),
                    text=text, token_ids=ids, cached=scope.cached,
                )  # fmt: skip
            case Slot(name, max_tokens):
                return PlacedSlot(
                    owner=owner, role=role, start=start, stop=start + (max_tokens or 0),
                    name=name, max_tokens=max_tokens,
                )  # fmt: skip
        return PlacedParam(
            owner=owner, role=role, start=start, stop=start + node.length,
            name=node.name, length=node.length, scaffold_ids=self._scaffold_ids(node),
        )  # fmt: skip

    def _scaffold_ids(self, node: Param) -> tuple[int, ...]:
        ids = tuple(self._tokenise(node.scaffold)) if node.scaffold else ()
        if len(ids) > node.length:
            raise error_at(
                self._schema.source,
                node.line,
                f"the scaffold of parameter {quoted(node.name)} has {len(ids)} tokens, the "
                f"parameter holds {node.length}; raise len= or shorten it",
            )
        return ids

    def _union(self, node: Union, scope: _Scope) -> Iterator[PlacedModule]:
        start, before = self._position, self._previous
        stop, after = start, before
        number, self._unions = self._unions, self._unions + 1
        for member in node.members:
            self._position, self._previous = start, before
            yield self.module(member, scope, number)
            stop, after = max(stop, self._position), after | self._previous
        self._position, self._previous = stop, after

    def _role(self, node: Role, scope: _Scope) -> Iterator[PlacedItem]:
        if all(isinstance(child, Scaffold) for child in node.children):
            yield from self._items(node.children, scope)
            return
        before = self._previous
        found = [self._marks(role, node.role) for role in before]
        reserved = max((len(mark.token_ids) for mark in found if mark is not None), default=0)
        role = PlacedRole(node.role, self._position, reserved, node.is_apart)
        self._position += reserved
        yield from self._items(node.children, replace(scope, role=role))
        is_certain = any(isinstance(child, Text | Param) for child in node.children)
        self._previous = frozenset([node.role]) | (frozenset() if is_certain else before)
