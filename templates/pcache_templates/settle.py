"""Raw trees, as templates compile into them, made schemas: nothing empty, every name unique.

Every run of text and parameters becomes a module of its own, unless it is all that its module
holds. So nothing in a schema is bound to be in a prompt, and early ends of loops or programs need
no care.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from itertools import groupby

from pcache_core.errors import OptionError
from pcache_templates.names import UniqueNames, xml_name
from pcache_templates.pml import to_pml
from pcache_templates.schema import (
    DEFAULT_PARAM_TOKENS,
    Module,
    Node,
    Param,
    Path,
    Place,
    Role,
    Schema,
    Slot,
    Text,
    Union,
    walk,
)


def settle(name: str | None, nodes: Iterable[Node], lengths: Mapping[str, int]) -> Schema:
    """Make a schema of raw nodes.

    name: None for one made of the content. lengths: tokens by parameter.
    Raises: OptionError: a length is no number above zero, or is for no parameter.
    Raises: TemplateError: a name is made of the content, and that can't be written as PML.
    """
    raw = tuple(nodes)
    _check_lengths(lengths, {node.name for node in walk(raw) if isinstance(node, Param)})
    settler = _Settler(lengths)
    schema = Schema("", settler.container(raw), settler.places)
    if name is None:
        name = f"prompt-{sha256(to_pml(schema).encode()).hexdigest()[:8]}"
    return replace(schema, name=xml_name(name, otherwise="prompt"))


def _check_lengths(lengths: Mapping[str, int], known: set[str]) -> None:
    for name, length in lengths.items():
        if name not in known:
            raise OptionError(
                f"a length is given for {name!r}, which is no parameter of the template; "
                f"it has {', '.join(sorted(known)) or 'none'}"
            )
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise OptionError(f"the length of {name!r} must be a number of tokens, got {length!r}")


class _Settler:
    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.places: dict[Path, Place] = {}
        self._lengths = lengths
        self._names = UniqueNames()
        self._num_runs = 0

    def container(self, nodes: Iterable[Node]) -> tuple[Node, ...]:
        """The children of what holds modules."""
        settled: list[Node] = []
        for is_run, group in groupby(nodes, key=_is_leaf):
            if is_run:
                settled += self._run(tuple(group))
                continue
            for node in group:
                settled += self._structure(node)
        return tuple(settled)

    def _run(self, leaves: tuple[Node, ...]) -> list[Node]:
        if not _holds_something(leaves):
            return []
        self._num_runs += 1
        return [self._leaf_module(f"text-{self._num_runs}", leaves)]

    def _structure(self, node: Node) -> list[Node]:
        match node:
            case Module():
                return list(self._module(node))
            case Union():
                members = [settled for member in node.members for settled in self._module(member)]
                return [Union(tuple(members))] if len(members) > 1 else list(members)
            case Slot():
                return self._slot(node)
            case Role():
                return [Role(node.name, self.container(node.children))]
            case _:
                raise AssertionError("leaves are grouped into runs")

    def _module(self, module: Module) -> list[Module]:
        if not _holds_something(module.children):
            return []
        if all(map(_is_leaf, module.children)):
            return [self._leaf_module(module.name, module.children)]
        name = self._names.take(xml_name(module.name))
        return [Module(name, self.container(module.children))]

    def _leaf_module(self, name: str, leaves: tuple[Node, ...]) -> Module:
        name = self._names.take(xml_name(name))
        params = UniqueNames()
        children: list[Node] = []
        for leaf in leaves:
            if isinstance(leaf, Param):
                length = self._lengths.get(leaf.name, DEFAULT_PARAM_TOKENS)
                leaf = replace(leaf, name=params.take(xml_name(leaf.name)), length=length)
                self.places[leaf.origin] = Place(name, leaf.name, leaf.kind)
            elif isinstance(leaf, Text):
                self.places[leaf.origin] = Place(name)
            children.append(leaf)
        return Module(name, tuple(children))

    def _slot(self, slot: Slot) -> list[Node]:
        """The slot, and beside it the texts that are written into it again and again."""
        name = self._names.take(xml_name(slot.name))
        self.places[slot.origin] = Place(name, slot=name)
        modules: dict[str, Module] = {}
        for leaf in walk(slot.body):
            if isinstance(leaf, Param):
                place = Place(name, xml_name(leaf.name), leaf.kind, slot=name)
            elif isinstance(leaf, Text) and any(map(str.isalnum, leaf.text)):
                if leaf.text not in modules:
                    text_name = self._names.take(f"{name}-text-{len(modules) + 1}")
                    modules[leaf.text] = Module(text_name, (Text(leaf.text),))
                place = Place(modules[leaf.text].name, slot=name)
            elif isinstance(leaf, Text | Slot):
                place = Place(name, slot=name)  # a bullet or a blank is no module
            else:
                continue
            self.places[leaf.origin] = place
        return [Slot(name), *modules.values()]


def _is_leaf(node: Node) -> bool:
    return isinstance(node, Text | Param)


def _holds_something(nodes: tuple[Node, ...]) -> bool:
    return any(
        node.text if isinstance(node, Text) else isinstance(node, Param | Slot | Role)
        for node in walk(nodes)
    )
