"""Template trees made schemas: nothing empty, every name unique.

Every run of text and parameters becomes a module of its own, unless it is all that its module
holds. So nothing in a schema is bound to be in a prompt, and early ends of loops or programs need
no care.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from itertools import groupby
from typing import NamedTuple, cast

from pcache_core.errors import OptionError
from pcache_core.pml.nodes import (
    DEFAULT_PARAM_TOKENS,
    Module,
    Param,
    Role,
    RoleName,
    Schema,
    SchemaNode,
    Slot,
    Text,
    Union,
)
from pcache_templates.pml import to_pml
from pcache_templates.tree import Node, Path, Place, walk, xml_name


class Settled(NamedTuple):
    """A template's schema, and what it calls the places of the template."""

    schema: Schema
    places: Mapping[Path, Place]


def settle(name: str | None, parts: Iterable[Node], lengths: Mapping[str, int]) -> Settled:
    """Make a schema of a template's tree.

    name: None for one made of the content. lengths: tokens by parameter or slot, as the schema
        calls it, or as the template does for all that it calls so.
    Raises: OptionError: a length is not a number above zero, or is for no parameter or slot.
    Raises: TemplateError: a name is made of the content, and that can't be written as PML.
    """
    for key, length in lengths.items():
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise OptionError(f"the length of {key!r} must be a number of tokens, got {length!r}")
    settler = _Settler(lengths)
    schema = Schema("", settler.nodes(parts))
    for key in lengths:
        if key not in settler.sized:
            raise OptionError(
                f"a length is given for {key!r}, which is no parameter of the template; "
                f"it has {', '.join(sorted(settler.sized)) or 'none'}"
            )
    if name is None:
        name = f"prompt-{sha256(to_pml(schema).encode()).hexdigest()[:8]}"
    return Settled(replace(schema, name=xml_name(name, otherwise="prompt")), settler.places)


class _UniqueNames:
    """Gives out every name once: the second `else` is `else-2`."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def take(self, name: str) -> str:
        """Return `name`, or the first of `name-2`, `name-3`, … that is free."""
        free, number = name, self._numbers.get(name, 1)
        while free in self._numbers:
            number += 1
            free = f"{name}-{number}"
        self._numbers[name] = number
        self._numbers.setdefault(free, 1)
        return free


class _Settler:
    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.places: dict[Path, Place] = {}
        self.sized: set[str] = set()  # names that may be given a length
        self._lengths = lengths
        self._names = _UniqueNames()
        self._num_runs = 0

    def nodes(self, parts: Iterable[Node]) -> tuple[SchemaNode, ...]:
        """Return the children of what holds modules."""
        made: list[SchemaNode] = []
        for is_run, group in groupby(parts, key=lambda part: part.is_leaf):
            if not is_run:
                made += [node for part in group for node in self._structure(part)]
            elif _holds_something(leaves := tuple(group)):
                self._num_runs += 1
                made.append(self._leaf_module(f"text-{self._num_runs}", leaves))
        return tuple(made)

    def _structure(self, part: Node) -> Iterable[SchemaNode]:
        match part.kind:
            case "module":
                return self._module(part)
            case "union":
                members = [module for member in part.parts for module in self._module(member)]
                return [Union(tuple(members))] if len(members) > 1 else members
            case "slot":
                return self._slot(part)
            case _:
                return [Role(cast(RoleName, part.content), self.nodes(part.parts))]

    def _module(self, part: Node) -> list[Module]:
        if not _holds_something(part.parts):
            return []
        if all(inner.is_leaf for inner in part.parts):
            return [self._leaf_module(part.content, part.parts)]
        name = self._names.take(xml_name(part.content))
        return [Module(name, self.nodes(part.parts))]

    def _leaf_module(self, name: str, leaves: Iterable[Node]) -> Module:
        name = self._names.take(xml_name(name))
        params = _UniqueNames()
        children: list[SchemaNode] = []
        for leaf in leaves:
            place = Place(name)
            if leaf.kind == "param":
                param = params.take(xml_name(leaf.content))
                length = self._length(param, leaf.content) or DEFAULT_PARAM_TOKENS
                children.append(Param(param, length))
                place = Place(name, param, leaf.kind_of_value)
            elif leaf.content:
                children.append(Text(leaf.content))
            self.places[leaf.origin] = place
        return Module(name, tuple(children))

    def _slot(self, slot: Node) -> list[SchemaNode]:
        """Return the slot, and beside it the texts that are written into it again and again."""
        name = self._names.take(xml_name(slot.content))
        self.places[slot.origin] = Place(name, slot=name)
        modules: dict[str, Module] = {}
        for part in walk(slot.parts):
            place = Place(name, slot=name)  # a bullet or a blank is not a module
            if part.kind == "param":
                place = Place(name, xml_name(part.content), part.kind_of_value, slot=name)
            elif part.kind == "text" and any(map(str.isalnum, part.content)):
                if part.content not in modules:
                    text_name = self._names.take(f"{name}-text-{len(modules) + 1}")
                    modules[part.content] = Module(text_name, (Text(part.content),))
                place = Place(modules[part.content].name, slot=name)
            if part.is_leaf or part.kind == "slot":
                self.places[part.origin] = place
        return [Slot(name, self._length(name, slot.content)), *modules.values()]

    def _length(self, *names: str) -> int | None:
        """Return the length given for the first of the names that has one."""
        self.sized.update(names)
        return next((self._lengths[name] for name in names if name in self._lengths), None)


def _holds_something(parts: Iterable[Node]) -> bool:
    return any(
        part.content if part.kind == "text" else part.kind in ("param", "slot", "role")
        for part in walk(parts)
    )
