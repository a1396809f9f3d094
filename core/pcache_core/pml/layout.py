"""Where everything of a schema stands: absolute positions, as in the paper. Pure.

A schema is laid out once, from its first position on, in its own order. Text takes its tokens,
a parameter its length, a slot its `max_tokens`, a union the longest of its modules, which all
start where the union does (arXiv 2311.04934, section 3.3). Chat messages begin with their mark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from pcache_core.pml.places import (
    Layout,
    Marks,
    ModulePath,
    PlacedItem,
    PlacedModule,
    PlacedParam,
    PlacedRole,
    PlacedSlot,
    PlacedText,
    Tokenise,
    no_marks,
)
from pcache_core.pml.source import error_at, quoted


def place(
    schema: Schema, tokenise: Tokenise, *, marks: Marks = no_marks, first_position: int = 0
) -> Layout:
    """Give every text, parameter, slot and module of a schema its absolute positions.

    tokenise: each text is tokenised alone. marks: of the model's chat template.
    first_position: behind whatever precedes every prompt, such as a beginning-of-sequence token.
    Raises: PMLError: the schema breaks a rule; a parameter's scaffold is longer than its length.
    """
    check_schema(schema)
    placer = _Placer(schema, tokenise, marks)
    root = placer.root(first_position)
    return Layout(schema, root, tuple(placer.scaffolds), tokenise, marks)


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

    def __init__(self, schema: Schema, tokenise: Tokenise, marks: Marks) -> None:
        self.scaffolds: list[tuple[ModulePath, ...]] = []
        self._schema, self._tokenise, self._marks = schema, tokenise, marks
        self._position = 0
        self._previous: frozenset[RoleName | None] = frozenset([None])
        self._unions = 0

    def root(self, first_position: int) -> PlacedModule:
        """The schema as the outermost module."""
        self._position = first_position
        items = self._items(self._schema.children, _Scope())
        return PlacedModule(
            owner=(),
            name="",
            start=first_position,
            stop=self._position,
            role=None,
            cached=True,
            union=None,
            items=items,
            line=self._schema.line,
        )

    def _items(self, children: Sequence[SchemaNode], scope: _Scope) -> tuple[PlacedItem, ...]:
        return tuple(item for node in children for item in self._placed(node, scope))

    def _placed(self, node: SchemaNode, scope: _Scope) -> Iterator[PlacedItem]:
        match node:
            case Module():
                yield self._module(node, scope, None)
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
        owner, start, role, line = scope.path, self._position, scope.role, node.line
        match node:
            case Text(text):
                return PlacedText(
                    owner=owner,
                    start=start,
                    role=role,
                    line=line,
                    text=text,
                    token_ids=tuple(self._tokenise(text)),
                    cached=scope.cached,
                )
            case Slot(name, max_tokens):
                return PlacedSlot(
                    owner=owner, start=start, role=role, line=line, name=name, max_tokens=max_tokens
                )
        return PlacedParam(
            owner=owner,
            start=start,
            role=role,
            line=line,
            name=node.name,
            length=node.length,
            scaffold_ids=self._scaffold_ids(node),
        )

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

    def _module(self, node: Module, scope: _Scope, union: int | None) -> PlacedModule:
        start, before = self._position, self._previous
        inside = _Scope((*scope.path, node.name), scope.cached and node.cache, scope.role)
        items = self._items(node.children, inside)
        self._previous |= before  # a prompt may leave it out
        return PlacedModule(
            owner=scope.path,
            name=node.name,
            start=start,
            stop=self._position,
            role=scope.role,
            cached=inside.cached,
            union=union,
            items=items,
            line=node.line,
        )

    def _union(self, node: Union, scope: _Scope) -> Iterator[PlacedModule]:
        start, before = self._position, self._previous
        stop, after = start, before
        number, self._unions = self._unions, self._unions + 1
        for member in node.members:
            self._position, self._previous = start, before
            yield self._module(member, scope, number)
            stop, after = max(stop, self._position), after | self._previous
        self._position, self._previous = stop, after

    def _role(self, node: Role, scope: _Scope) -> Iterator[PlacedItem]:
        if all(isinstance(child, Scaffold) for child in node.children):
            self._items(node.children, scope)
            return
        before = self._previous
        found = [self._marks(role, node.role) for role in before]
        reserved = max((len(mark.token_ids) for mark in found if mark is not None), default=0)
        role = PlacedRole(node.role, self._position, reserved)
        self._position += reserved
        yield from self._items(node.children, _Scope(scope.path, scope.cached, role))
        is_certain = any(isinstance(child, Text | Param) for child in node.children)
        self._previous = frozenset([node.role]) | (frozenset() if is_certain else before)
