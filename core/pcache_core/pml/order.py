"""What a prompt of a schema consists of, in the order in which it is read; not yet placed.

All rules that tie a prompt to its schema are here. A use is looked up in the scope where it stands:
a module's own modules are used inside its use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, TypeVar

from pcache_core.errors import PMLError
from pcache_core.pml.layout import (
    ModulePath,
    PlacedItem,
    PlacedModule,
    PlacedParam,
    PlacedRole,
    PlacedSlot,
    PlacedText,
    SchemaLayout,
)
from pcache_core.pml.nodes import Document, ModuleUse, PromptNode, PromptTree, Text, Turn
from pcache_core.pml.source import error_at, hint, quoted

RunKind = Literal["module", "anonymous", "argument", "document", "text", "mark"]
Positions = Literal["schema", "compact"]
Message: TypeAlias = PlacedRole | Turn | None
_Item = TypeVar("_Item", PlacedModule, PlacedParam, PlacedSlot)


@dataclass(frozen=True, slots=True)
class UnplacedRun:
    """Tokens that follow each other, and where the schema's positions put them.

    owner: path of the module or slot. name: of the parameter or document.
    home: its place in the schema; None for what the schema has no place for. begins: the position
        of a run without home: None is after the run before it.
    is_last: it begins after every position in use.
    message: of the schema or of the prompt.
    """

    kind: RunKind
    text: str
    token_ids: tuple[int, ...]
    owner: ModulePath
    message: Message
    name: str | None = None
    home: int | None = None
    begins: int | None = None
    is_last: bool = False
    is_reusable: bool = False


def in_order(
    layout: SchemaLayout, prompt: PromptTree, positions: Positions
) -> tuple[list[UnplacedRun], set[ModulePath]]:
    """Put everything that a prompt consists of in order.

    With the schema's positions, modules stand in the schema's order, since that is what positions
    say; compact, in the prompt's. Text of the schema goes before the first module after it. Text of
    the prompt follows the module it comes after; before the first, it stays there; after the last,
    it goes to the end of everything.

    Returns: the runs that have tokens, and the paths of the modules that are used.
    Raises: PMLError: another schema; an unknown module, slot or parameter; a module used twice,
        outside of its parent, or beside another of its union; an argument missing; documents
        outside of slots; text in a module that holds none; a message within a message; an argument
        or a slot's documents are too long; documents in a slot without `max_tokens` have no place
        among the schema's positions.
    """
    writer = _Writer(layout, prompt, positions)
    return [run for run in writer.prompt() if run.token_ids], writer.used


@dataclass(slots=True, eq=False)
class _Use:
    """A module or slot that is used, and the prompt's own text that belongs to it.

    turn: the prompt's message that puts it there, if one does. leading: texts before the first use,
    trailing: after this one, up to the next; each with the message that it is in.
    """

    item: PlacedModule | PlacedSlot
    node: ModuleUse
    turn: Turn | None
    leading: list[tuple[Text, Turn | None]] = field(default_factory=list)
    trailing: list[tuple[Text, Turn | None]] = field(default_factory=list)


class _Writer:
    def __init__(self, layout: SchemaLayout, prompt: PromptTree, positions: Positions) -> None:
        self.used: set[ModulePath] = set()
        self._layout, self._prompt, self._positions = layout, prompt, positions
        self._known: dict[ModulePath, dict[str, PlacedModule | PlacedSlot]] = {}

    def prompt(self) -> Iterator[UnplacedRun]:
        """Yield everything in order."""
        prompt, root = self._prompt, self._layout.root
        name = self._layout.schema.name
        if prompt.schema != name:
            raise self._error(
                prompt.line, f"the prompt is of schema {quoted(prompt.schema)}, not of {name!r}"
            )
        uses, texts = self._uses(root, _flat(prompt.children))
        if uses:
            texts, uses[-1].trailing = uses[-1].trailing, []
        yield from self._module(root, prompt, uses, None)
        for text, turn in texts:
            yield replace(self._free(text, turn), is_last=True)

    def _uses(
        self, scope: PlacedModule, children: Iterable[tuple[PromptNode, Turn | None]]
    ) -> tuple[list[_Use], list[tuple[Text, Turn | None]]]:
        """Return the uses in a scope with their text, and the text of a scope without uses."""
        texts: list[tuple[Text, Turn | None]] = []
        uses: list[_Use] = []
        for node, turn in children:
            match node:
                case Text():
                    (uses[-1].trailing if uses else texts).append((node, turn))
                case ModuleUse():
                    uses.append(_Use(self._item(scope, node, turn), node, turn))
                case Document():
                    raise self._error(
                        node.line,
                        f"a document can't stand in {_shown(scope.path)}, only in a slot; "
                        f"{hint('', _named(scope, PlacedSlot))}",
                    )
                case _:
                    raise self._error(
                        node.line, "a message can't stand here; put it right into <prompt>"
                    )
        self._check_exclusive(uses)
        if uses:
            uses[0].leading, texts = texts, []
        return uses, texts

    def _item(
        self, scope: PlacedModule, node: ModuleUse, turn: Turn | None
    ) -> PlacedModule | PlacedSlot:
        """Return what a use means in its scope."""
        items = self._known.get(scope.path)
        if items is None:
            items = {**_named(scope, PlacedModule), **_named(scope, PlacedSlot)}
            self._known[scope.path] = items
        item = items.get(node.name)
        if item is None:
            raise self._error(node.line, self._unknown(scope, node.name, items))
        if turn is not None and (item.role is not None or _has_role(item)):
            raise self._error(
                node.line,
                f"{node.name!r} is in a message of the schema already; take it out of "
                f"<{turn.role}>",
            )
        return item

    def _check_exclusive(self, uses: Iterable[_Use]) -> None:
        """Refuse a module that is used twice, and two of a union."""
        lines: dict[str, int | None] = {}
        unions: dict[int, str] = {}
        for use in uses:
            name, line = use.item.name, use.node.line
            if name in lines:
                first = f" (line {lines[name]})" if lines[name] is not None else ""
                raise self._error(line, f"{name!r} is used already{first}; remove one")
            lines[name] = line
            if isinstance(use.item, PlacedModule) and use.item.union is not None:
                rival = unions.setdefault(use.item.union, name)
                if rival != name:
                    raise self._error(
                        line, f"{name!r} and {rival!r} are of one union; use one of them"
                    )

    def _module(
        self,
        module: PlacedModule,
        node: ModuleUse | PromptTree,
        uses: list[_Use],
        turn: Turn | None,
    ) -> Iterator[UnplacedRun]:
        """Yield a module's own text and arguments, with what is used in it in between."""
        self.used.add(module.path)
        self._check_arguments(module, node)
        items = module.items
        places = {id(item): index for index, item in enumerate(items)}
        if self._positions == "schema":
            uses = sorted(uses, key=lambda use: places[id(use.item)])
        done = 0
        for use in uses:
            index = places[id(use.item)]
            yield from self._own(items[done:index], node, turn)
            done = max(done, index + 1)
            yield from self._used(use)
        yield from self._own(items[done:], node, turn)

    def _own(
        self, items: Iterable[PlacedItem], node: ModuleUse | PromptTree, turn: Turn | None
    ) -> Iterator[UnplacedRun]:
        for item in items:
            message = turn or item.role
            if isinstance(item, PlacedText):
                kind: RunKind = "module" if item.owner else "anonymous"
                yield UnplacedRun(
                    kind, item.text, item.token_ids, item.owner, message,
                    home=item.start, is_reusable=item.cached,
                )  # fmt: skip
            elif isinstance(item, PlacedParam):
                text = node.arguments[item.name]
                ids = self._ids(text)
                if len(ids) > item.length:
                    raise self._error(
                        node.line,
                        f"argument {item.name!r} has {len(ids)} tokens, the parameter holds "
                        f"{item.length}; raise len= or shorten it",
                    )
                yield UnplacedRun(
                    "argument", text, ids, item.owner, message, name=item.name, home=item.start
                )

    def _used(self, use: _Use) -> Iterator[UnplacedRun]:
        item, node = use.item, use.node
        message = use.turn or item.role
        for text, turn in use.leading:
            yield self._free(text, turn or message)
        if isinstance(item, PlacedSlot):
            yield from self._slot(item, node, message)
        else:
            uses, texts = self._uses(item, ((child, use.turn) for child in node.children))
            if texts:
                raise self._error(
                    texts[0][0].line,
                    f"text can't stand in <{node.name}> unless one of its modules does; put it "
                    f"after </{node.name}>",
                )
            yield from self._module(item, node, uses, use.turn)
        begins: int | None = item.stop
        for text, turn in use.trailing:
            run = replace(self._free(text, turn or message), begins=begins)
            yield run
            begins = None if run.token_ids else begins

    def _slot(self, slot: PlacedSlot, node: ModuleUse, message: Message) -> Iterator[UnplacedRun]:
        for name in node.arguments:
            raise self._error(node.line, f"slot {node.name!r} takes no argument {quoted(name)}")
        runs = [self._in_slot(slot, part, message) for part in node.children]
        runs = [run for run in runs if run.token_ids]
        count = sum(len(run.token_ids) for run in runs)
        if slot.max_tokens is not None and count > slot.max_tokens:
            raise self._error(
                node.line,
                f"slot {slot.name!r} gets {count} tokens, it holds {slot.max_tokens}; raise "
                "max-tokens= or leave documents out",
            )
        is_open = slot.max_tokens is None
        if runs and is_open and self._positions == "schema" and self._layout.stop > slot.start:
            raise self._error(
                node.line,
                f"slot {slot.name!r} has no max-tokens, so positions of what stands after it "
                "are unknown; set max-tokens=, or use positions='compact'",
            )
        for index, run in enumerate(runs):
            yield replace(run, begins=slot.start if index == 0 else None, is_last=is_open)

    def _in_slot(self, slot: PlacedSlot, part: PromptNode, message: Message) -> UnplacedRun:
        if not isinstance(part, Document | Text):
            raise self._error(
                part.line, f"slot {slot.name!r} holds documents; write <document>…</document>"
            )
        text = self._plain(part.text, part.line)
        owner = (*slot.owner, slot.name)
        if isinstance(part, Text):
            return UnplacedRun("text", text, self._ids(text), owner, message)
        return UnplacedRun(
            "document", text, self._ids(text), owner, message, name=part.name, is_reusable=True
        )

    def _free(self, node: Text, message: Message) -> UnplacedRun:
        text = self._plain(node.text, node.line)
        return UnplacedRun("text", text, self._ids(text), (), message)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._layout.tokenise(text))

    def _check_arguments(self, module: PlacedModule, node: ModuleUse | PromptTree) -> None:
        params = _named(module, PlacedParam)
        place, line = _shown(module.path), node.line
        for name, text in node.arguments.items():
            if name not in params:
                raise self._error(
                    line, f"{place} has no parameter {quoted(name)}; {hint(name, params)}"
                )
            self._plain(text, line)
        for name in params:
            if name not in node.arguments:
                raise self._error(line, f'{place} needs an argument for {name!r}; write {name}="…"')

    def _unknown(self, scope: PlacedModule, name: str, known: Mapping[str, object]) -> str:
        for module in self._layout.modules():
            if module.name == name:
                opening = "".join(f"<{part}>" for part in module.owner)
                closing = "".join(f"</{part}>" for part in reversed(module.owner))
                return (
                    f"module {name!r} is in {_shown(module.owner)}, not in "
                    f"{_shown(scope.path)}; write {opening}<{name}/>{closing}"
                )
        return f"{_shown(scope.path)} has no module or slot {quoted(name)}; {hint(name, known)}"

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


def _flat(children: Iterable[PromptNode]) -> Iterator[tuple[PromptNode, Turn | None]]:
    """Yield children with the message that they are in, in place of the messages."""
    for node in children:
        if isinstance(node, Turn):
            turn = replace(node)  # a message of its own, should a tree hold the same node twice
            yield from ((inner, turn) for inner in node.children)
        else:
            yield node, None


def _named(scope: PlacedModule, kind: type[_Item]) -> dict[str, _Item]:
    return {item.name: item for item in scope.items if isinstance(item, kind)}


def _has_role(item: PlacedModule | PlacedSlot) -> bool:
    """Tell whether a message of the schema is somewhere in the module."""
    inside = item.items if isinstance(item, PlacedModule) else ()
    return any(
        part.role is not None or (isinstance(part, PlacedModule) and _has_role(part))
        for part in inside
    )


def _shown(path: ModulePath) -> str:
    return f"module {'/'.join(path)!r}" if path else "the schema"
