"""Which modules of a schema a prompt uses: every rule that ties the two together, without tokens.

A use is looked up in the scope where it stands: a module's own modules are used inside its use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from pcache_core.errors import PMLError
from pcache_core.pml.nodes import Document, ModuleUse, PromptNode, PromptTree, Text, Turn
from pcache_core.pml.places import Layout, ModulePath, PlacedModule, PlacedParam, PlacedSlot
from pcache_core.pml.source import error_at, hint, quoted

_Tagged: TypeAlias = tuple[PromptNode, Turn | None]
_Item = TypeVar("_Item", PlacedModule, PlacedParam, PlacedSlot)


@dataclass(frozen=True, slots=True, eq=False)
class FreeText:
    """Text of the prompt itself. turn: the prompt's message that it is in."""

    text: str
    turn: Turn | None
    line: int | None


@dataclass(frozen=True, slots=True, eq=False)
class FilledSlot:
    """A slot and what the prompt puts into it."""

    item: PlacedSlot
    parts: tuple[Document | Text, ...]
    turn: Turn | None
    line: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """A use and the free text that belongs to it.

    leading: text before the first use. trailing: text behind this one, up to the next.
    """

    leading: tuple[FreeText, ...]
    use: Use
    trailing: tuple[FreeText, ...]


@dataclass(frozen=True, slots=True, eq=False)
class UsedModule:
    """A module that is used. turn: the prompt's message that puts it there, if one does."""

    item: PlacedModule
    arguments: Mapping[str, str]
    groups: tuple[Group, ...]
    turn: Turn | None
    line: int | None

    def paths(self) -> Iterator[tuple[str, ...]]:
        """Of the module and all that is used in it."""
        yield self.item.path
        for group in self.groups:
            if isinstance(group.use, UsedModule):
                yield from group.use.paths()


Use: TypeAlias = UsedModule | FilledSlot


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What a prompt makes of a schema. tail: the text behind the last use."""

    root: UsedModule
    tail: tuple[FreeText, ...]


def choose(layout: Layout, prompt: PromptTree) -> Choice:
    """Tie a prompt to its schema.

    Raises: PMLError: another schema; an unknown module, slot or parameter; a module used twice,
        outside of its parent, or beside another of its union; an argument missing; documents
        outside of slots; text in a module that holds none; a message within a message.
    """
    return _Chooser(layout, prompt).choice()


class _Chooser:
    def __init__(self, layout: Layout, prompt: PromptTree) -> None:
        self._layout, self._prompt = layout, prompt
        self._known: dict[ModulePath, dict[str, PlacedModule | PlacedSlot]] = {}

    def choice(self) -> Choice:
        """The whole prompt."""
        prompt, root = self._prompt, self._layout.root
        name = self._layout.schema.name
        if prompt.schema != name:
            raise self._error(
                prompt.line, f"the prompt is of schema {quoted(prompt.schema)}, not of {name!r}"
            )
        arguments = self._arguments(root, prompt.arguments, prompt.line)
        groups, tail = self._groups(root, tuple(_flat(prompt.children)))
        if groups:
            last = groups.pop()
            groups.append(replace(last, trailing=()))
            tail = last.trailing
        return Choice(UsedModule(root, arguments, tuple(groups), None, prompt.line), tail)

    def _groups(
        self, scope: PlacedModule, children: Iterable[_Tagged]
    ) -> tuple[list[Group], tuple[FreeText, ...]]:
        """Uses with their text, and the text of a scope without uses."""
        leading: list[FreeText] = []
        found: list[tuple[Use, list[FreeText]]] = []
        for node, turn in children:
            match node:
                case Text(text, line):
                    free = FreeText(self._plain(text, line), turn, line)
                    (found[-1][1] if found else leading).append(free)
                case ModuleUse():
                    found.append((self._use(scope, node, turn), []))
                case Document():
                    raise self._error(
                        node.line,
                        f"a document can't stand in {_shown(scope)}, only in a slot; "
                        f"{hint('', _named(scope, PlacedSlot))}",
                    )
                case _:
                    raise self._error(
                        node.line, "a message can't stand here; put it right into <prompt>"
                    )
        self._check_exclusive([use for use, _ in found])
        groups = [Group((), use, tuple(trailing)) for use, trailing in found]
        if groups:
            groups[0] = replace(groups[0], leading=tuple(leading))
        return groups, tuple(leading)

    def _use(self, scope: PlacedModule, node: ModuleUse, turn: Turn | None) -> Use:
        items = self._usable(scope)
        item = items.get(node.name)
        if item is None:
            raise self._error(node.line, self._unknown(scope, node.name, items))
        if turn is not None and (item.role is not None or _has_role(item)):
            raise self._error(
                node.line,
                f"{node.name!r} is in a message of the schema already; take it out of "
                f"<{turn.role}>",
            )
        if isinstance(item, PlacedSlot):
            return self._slot(item, node, turn)
        arguments = self._arguments(item, node.arguments, node.line)
        groups, texts = self._groups(item, ((child, turn) for child in node.children))
        if texts and not groups:
            raise self._error(
                texts[0].line,
                f"text can't stand in <{node.name}> unless one of its modules does; put it "
                f"behind </{node.name}>",
            )
        return UsedModule(item, arguments, tuple(groups), turn, node.line)

    def _usable(self, scope: PlacedModule) -> dict[str, PlacedModule | PlacedSlot]:
        """What may be used in a scope, by name."""
        items = self._known.get(scope.path)
        if items is None:
            items = {**_named(scope, PlacedModule), **_named(scope, PlacedSlot)}
            self._known[scope.path] = items
        return items

    def _slot(self, item: PlacedSlot, node: ModuleUse, turn: Turn | None) -> FilledSlot:
        for name in node.arguments:
            raise self._error(node.line, f"slot {node.name!r} takes no argument {quoted(name)}")
        parts = []
        for part in node.children:
            if not isinstance(part, Document | Text):
                raise self._error(
                    part.line, f"slot {node.name!r} holds documents; write <document>…</document>"
                )
            self._plain(part.text, part.line)
            parts.append(part)
        return FilledSlot(item, tuple(parts), turn, node.line)

    def _arguments(
        self, module: PlacedModule, given: Mapping[str, str], line: int | None
    ) -> dict[str, str]:
        params = _named(module, PlacedParam)
        for name in given:
            if name not in params:
                raise self._error(
                    line, f"{_shown(module)} has no parameter {quoted(name)}; {hint(name, params)}"
                )
        for name in params:
            if name not in given:
                raise self._error(
                    line, f'{_shown(module)} needs an argument for {name!r}; write {name}="…"'
                )
        return {name: self._plain(given[name], line) for name in given}

    def _check_exclusive(self, uses: Iterable[Use]) -> None:
        """A module is used once, and one of a union."""
        names: dict[str, int | None] = {}
        unions: dict[int, str] = {}
        for use in uses:
            name = use.item.name
            if name in names:
                first = f" (line {names[name]})" if names[name] is not None else ""
                raise self._error(use.line, f"{name!r} is used already{first}; remove one")
            names[name] = use.line
            if isinstance(use, UsedModule) and use.item.union is not None:
                rival = unions.setdefault(use.item.union, name)
                if rival != name:
                    raise self._error(
                        use.line, f"{name!r} and {rival!r} are of one union; use one of them"
                    )

    def _unknown(self, scope: PlacedModule, name: str, known: Iterable[str]) -> str:
        for module in self._layout.modules():
            if module.name == name:
                opening = "".join(f"<{part}>" for part in module.owner)
                closing = "".join(f"</{part}>" for part in reversed(module.owner))
                return (
                    f"module {name!r} is in {_shown_path(module.owner)}, not in "
                    f"{_shown(scope)}; write {opening}<{name}/>{closing}"
                )
        return f"{_shown(scope)} has no module or slot {quoted(name)}; {hint(name, known)}"

    def _plain(self, text: str, line: int | None) -> str:
        if not isinstance(text, str):
            raise self._error(line, f"text and arguments are str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self._error(
                line, "half a surrogate pair; decode the text's source with errors='replace'"
            ) from None
        return text

    def _error(self, line: int | None, message: str) -> PMLError:
        return error_at(self._prompt.source, line, message)


def _flat(children: Iterable[PromptNode]) -> Iterator[_Tagged]:
    """Children with the message that they are in, in place of the messages."""
    for node in children:
        if isinstance(node, Turn):
            turn = replace(node)  # a message of its own, should a tree hold the same node twice
            yield from ((inner, turn) for inner in node.children)
        else:
            yield node, None


def _named(scope: PlacedModule, kind: type[_Item]) -> dict[str, _Item]:
    return {item.name: item for item in scope.items if isinstance(item, kind)}


def _has_role(item: PlacedModule | PlacedSlot) -> bool:
    """Whether a message of the schema is somewhere in the module."""
    if isinstance(item, PlacedSlot):
        return False
    return any(
        part.role is not None or (isinstance(part, PlacedModule) and _has_role(part))
        for part in item.items
    )


def _shown(scope: PlacedModule) -> str:
    return _shown_path(scope.path)


def _shown_path(path: tuple[str, ...]) -> str:
    return f"module {'/'.join(path)!r}" if path else "the schema"
