"""A prompt's pieces in the order in which they are read, tokenised, not yet placed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from pcache_core.errors import PMLError
from pcache_core.pml.nodes import Document, PromptTree, Text, Turn
from pcache_core.pml.places import (
    Layout,
    ModulePath,
    PlacedItem,
    PlacedParam,
    PlacedRole,
    PlacedText,
)
from pcache_core.pml.source import Source, error_at
from pcache_core.pml.uses import FilledSlot, FreeText, Group, UsedModule, choose

RunKind = Literal["module", "anonymous", "argument", "document", "text", "mark"]
Positions = Literal["schema", "compact"]
Message: TypeAlias = PlacedRole | Turn | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that follow each other, and where the schema's positions put them.

    owner: path of the module or slot. name: of the parameter or document.
    home: its place in the schema; None for what the schema has no place for. begins: the position
        of a piece without home: None is behind the piece before it.
    is_last: it begins behind every position in use.
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
    line: int | None = None


def in_order(layout: Layout, prompt: PromptTree, positions: Positions) -> Ordered:
    """Put everything that a prompt consists of in order.

    With the schema's positions, modules stand in the schema's order, since that is what positions
    say; compact, in the prompt's. Text of the schema stands before the first module behind it.
    Text of the prompt stands behind the module before it, or else before the first; behind the
    last, it stands at the end of everything.

    Raises: PMLError: the prompt doesn't fit the schema; an argument or a slot's documents are too
        long; documents in a slot without `max_tokens` have no place among the schema's positions.
    """
    choice = choose(layout, prompt)
    writer = _Writer(layout, prompt.source, positions)
    pieces = [*writer.module(choice.root), *writer.tail(choice.tail)]
    used = frozenset(choice.root.paths())
    return Ordered(tuple(piece for piece in pieces if piece.token_ids), used)


@dataclass(frozen=True, slots=True)
class Ordered:
    """pieces: those with tokens. used: paths of the modules."""

    pieces: tuple[Piece, ...]
    used: frozenset[ModulePath]


class _Writer:
    def __init__(self, layout: Layout, source: Source | None, positions: Positions) -> None:
        self._layout, self._source, self._positions = layout, source, positions
        self._tokenise = layout.tokenise

    def module(self, used: UsedModule) -> Iterator[Piece]:
        """A module's own text and arguments, with what is used in it in between."""
        items = used.item.items
        places = {id(item): index for index, item in enumerate(items)}
        groups = [(places[id(group.use.item)], group) for group in used.groups]
        if self._positions == "schema":
            groups.sort(key=lambda pair: pair[0])
        done = 0
        for index, group in groups:
            yield from self._own(used, items[done:index])
            done = max(done, index + 1)
            yield from self._group(group)
        yield from self._own(used, items[done:])

    def tail(self, texts: Sequence[FreeText]) -> Iterator[Piece]:
        """Text at the end of everything."""
        for text in texts:
            yield replace(self._free(text, text.turn), is_last=True)

    def _group(self, group: Group) -> Iterator[Piece]:
        use = group.use
        message = use.turn or use.item.role
        for text in group.leading:
            yield self._free(text, text.turn or message)
        yield from self.module(use) if isinstance(use, UsedModule) else self._slot(use)
        begins: int | None = use.item.stop
        for text in group.trailing:
            piece = replace(self._free(text, text.turn or message), begins=begins)
            yield piece
            begins = None if piece.token_ids else begins

    def _own(self, used: UsedModule, items: Iterable[PlacedItem]) -> Iterator[Piece]:
        for item in items:
            message = used.turn or item.role
            if isinstance(item, PlacedText):
                yield Piece(
                    "module" if item.owner else "anonymous",
                    item.text,
                    item.token_ids,
                    item.owner,
                    message,
                    home=item.start,
                    begins=item.start,
                    is_reusable=item.cached,
                    line=item.line,
                )
            elif isinstance(item, PlacedParam):
                yield self._argument(used, item, message)

    def _argument(self, used: UsedModule, item: PlacedParam, message: Message) -> Piece:
        text = used.arguments[item.name]
        ids = tuple(self._tokenise(text))
        if len(ids) > item.length:
            raise self._error(
                used.line,
                f"argument {item.name!r} has {len(ids)} tokens, the parameter holds "
                f"{item.length}; raise len= or shorten it",
            )
        return Piece(
            "argument",
            text,
            ids,
            item.owner,
            message,
            name=item.name,
            home=item.start,
            begins=item.start,
            line=used.line,
        )

    def _slot(self, used: FilledSlot) -> Iterator[Piece]:
        item = used.item
        pieces = [self._in_slot(used, part) for part in used.parts]
        pieces = [piece for piece in pieces if piece.token_ids]
        count = sum(len(piece.token_ids) for piece in pieces)
        if item.max_tokens is not None and count > item.max_tokens:
            raise self._error(
                used.line,
                f"slot {item.name!r} gets {count} tokens, it holds {item.max_tokens}; raise "
                "max-tokens= or leave documents out",
            )
        is_open = item.max_tokens is None
        if pieces and is_open and self._positions == "schema" and self._layout.stop > item.start:
            raise self._error(
                used.line,
                f"slot {item.name!r} has no max-tokens, so positions of what stands behind it "
                "are unknown; set max-tokens=, or use positions='compact'",
            )
        for index, piece in enumerate(pieces):
            begins = item.start if index == 0 else None
            yield replace(piece, begins=begins, is_last=is_open)

    def _in_slot(self, used: FilledSlot, part: Document | Text) -> Piece:
        is_document = isinstance(part, Document)
        return Piece(
            "document" if is_document else "text",
            part.text,
            tuple(self._tokenise(part.text)),
            (*used.item.owner, used.item.name),
            used.turn or used.item.role,
            name=part.name if isinstance(part, Document) else None,
            is_reusable=is_document,
            line=part.line,
        )

    def _free(self, free: FreeText, message: Message) -> Piece:
        ids = tuple(self._tokenise(free.text))
        return Piece("text", free.text, ids, (), message, line=free.line)

    def _error(self, line: int | None, message: str) -> PMLError:
        return error_at(self._source, line, message)
