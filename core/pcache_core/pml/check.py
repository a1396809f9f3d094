"""The rules of schemas that a grammar can't say, for trees from text and trees built in Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pcache_core.errors import PMLError
from pcache_core.pml.grammar import is_name
from pcache_core.pml.markup import MAX_DEPTH
from pcache_core.pml.nodes import (
    ROLES,
    Module,
    Param,
    Role,
    Scaffold,
    Schema,
    SchemaNode,
    Slot,
    Text,
    Union,
)
from pcache_core.pml.source import error_at, hint, quoted

RESERVED = (*ROLES, "document", "prompt")


def check_schema(schema: Schema) -> None:
    """Refuse a schema that no prompt could use as it is meant.

    Names are names, unique where prompts look them up (unions and roles are no scope of their
    own), and none that prompts use themselves; lengths are positive; a role never stands in a
    role; unions and scaffolds name modules that are there and that go together.

    Raises: PMLError: with the line, where the tree has lines.
    """
    _Check(schema).scope(schema.children, _Place())


def in_scope(children: tuple[SchemaNode, ...]) -> Iterator[SchemaNode]:
    """Yield what a schema or module holds itself: roles and unions looked through, modules not."""
    for node in children:
        yield node
        if isinstance(node, Role):
            yield from in_scope(node.children)
        elif isinstance(node, Union):
            yield from node.members


class _Place(NamedTuple):
    """Where in a schema a check is. path: of the module; role: of the message around it."""

    path: tuple[str, ...] = ()
    role: str | None = None
    depth: int = 0


class _Check:
    def __init__(self, schema: Schema) -> None:
        self._source = schema.source
        self._members: dict[int, dict[str, tuple[Module, Union | None]]] = {}
        self._name(schema, "schema")

    def scope(self, children: tuple[SchemaNode, ...], place: _Place) -> None:
        """Check what a schema or module holds, and everything below."""
        self._nodes(children, place)
        self._unique(children, place.path)
        for node in in_scope(children):
            if isinstance(node, Scaffold):
                self._scaffold(node, children)

    def _nodes(self, children: tuple[SchemaNode, ...], place: _Place) -> None:
        if place.depth > MAX_DEPTH:
            raise error_at(self._source, None, f"over {MAX_DEPTH} levels deep; flatten the schema")
        below = place._replace(depth=place.depth + 1)
        for node in children:
            match node:
                case Module():
                    self._name(node, "module")
                    self.scope(node.children, below._replace(path=(*place.path, node.name)))
                case Union():
                    self._union(node)
                    self._nodes(node.members, below)
                case Role():
                    self._role(node, place.role)
                    self._nodes(node.children, below._replace(role=node.role))
                case Param():
                    self._name(node, "parameter")
                    self._positive(node, "length", node.length)
                case Slot():
                    self._name(node, "slot")
                    tokens = 1 if node.max_tokens is None else node.max_tokens
                    self._positive(node, "max_tokens", tokens)
                case Text():
                    self._text(node)
                case Scaffold():
                    pass  # once all names of its scope are known
                case _:
                    raise self._error(None, f"a schema can't hold {type(node).__name__}")

    def _error(self, line: int | None, message: str) -> PMLError:
        return error_at(self._source, line, message)

    def _name(self, node: Schema | Module | Slot | Param, kind: str) -> None:
        name = node.name
        if not isinstance(name, str) or not is_name(name):
            raise self._error(
                node.line,
                f"{kind} name {quoted(str(name))} is no name; use a letter or '_', then up to "
                "127 letters, digits, '.', '_' or '-'",
            )
        if isinstance(node, Module | Slot) and name in RESERVED:
            raise self._error(
                node.line, f"{kind} name {name!r} is a tag of prompts themselves; choose another"
            )

    def _positive(self, node: Param | Slot, field: str, value: int) -> None:
        if not isinstance(value, int) or value < 1:
            raise self._error(node.line, f"{node.name!r}: {field}={value!r} must be 1 or more")

    def _text(self, node: Text) -> None:
        if not isinstance(node.text, str) or not node.text:
            raise self._error(node.line, f"a text is at least one character, got {node.text!r}")
        try:
            node.text.encode()
        except UnicodeEncodeError:
            raise self._error(
                node.line, "text holds half a surrogate pair; decode it with errors='replace'"
            ) from None

    def _role(self, node: Role, around: str | None) -> None:
        if node.role not in ROLES:
            raise self._error(
                node.line, f"unknown role {quoted(str(node.role))}; {hint(str(node.role), ROLES)}"
            )
        if around is not None:
            raise self._error(
                node.line,
                f"<{node.role}> can't stand within <{around}>: messages don't nest; close "
                f"<{around}> first",
            )

    def _union(self, node: Union) -> None:
        for member in node.members:
            if not isinstance(member, Module):
                raise self._error(node.line, f"a union holds modules, got {type(member).__name__}")
        names = [member.name for member in node.members]
        if not names:
            raise self._error(node.line, "a union needs at least one module")
        if node.scaffold is not None and node.scaffold not in names:
            raise self._error(
                node.line,
                f"the union has no module {quoted(node.scaffold)}; {hint(node.scaffold, names)}",
            )

    def _unique(self, children: tuple[SchemaNode, ...], path: tuple[str, ...]) -> None:
        place = f"module {'/'.join(path)!r}" if path else "the schema"
        tags: dict[str, int | None] = {}
        attributes: dict[str, int | None] = {} if path else {"schema": None}
        for node in in_scope(children):
            if isinstance(node, Module | Slot | Param):
                names = attributes if isinstance(node, Param) else tags
                if node.name in names:
                    first = names[node.name]
                    behind = f" (line {first})" if first is not None else ""
                    raise self._error(
                        node.line, f"{place} has {node.name!r} already{behind}; rename one"
                    )
                names[node.name] = node.line

    def _scaffold(self, node: Scaffold, children: tuple[SchemaNode, ...]) -> None:
        if len(node.modules) < 2:
            raise self._error(
                node.line, f"a scaffold joins two or more modules, got {len(node.modules)}"
            )
        chosen: dict[int, str] = {}  # by union, its member that the scaffold needs
        seen: set[str] = set()
        for path in node.modules:
            if path in seen:
                raise self._error(node.line, f"the scaffold names {quoted(path)} twice")
            seen.add(path)
            scope = children
            for name in path.split("/"):
                found = self._member(scope, name)
                if found is None:
                    raise self._error(
                        node.line,
                        f"the scaffold's {quoted(path)} is no module here; "
                        f"{hint(name, self._members[id(scope)])}",
                    )
                module, union = found
                if union is not None and chosen.setdefault(id(union), name) != name:
                    raise self._error(
                        node.line,
                        f"{quoted(chosen[id(union)])} and {quoted(name)} are of one union, so no "
                        "prompt uses both; make a scaffold for each",
                    )
                scope = module.children

    def _member(
        self, scope: tuple[SchemaNode, ...], name: str
    ) -> tuple[Module, Union | None] | None:
        """Return the module of a name in a scope, and the union that it is in."""
        members = self._members.get(id(scope))
        if members is None:
            nodes = tuple(in_scope(scope))
            members = {node.name: (node, None) for node in nodes if isinstance(node, Module)}
            for union in nodes:
                if isinstance(union, Union):
                    members.update((member.name, (member, union)) for member in union.members)
            self._members[id(scope)] = members
        return members.get(name)
