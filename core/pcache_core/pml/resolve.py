"""A prompt of a schema as a flat list of runs: which tokens, in which order, at which positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import get_args

from pcache_core.errors import OptionError
from pcache_core.pml.layout import Marks, ModulePath, PlacedRole, SchemaLayout
from pcache_core.pml.nodes import PromptTree, RoleName, Turn
from pcache_core.pml.order import Message, Positions, RunKind, UnplacedRun, in_order
from pcache_core.pml.source import error_at


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Tokens at positions that follow each other.

    kind: `module` and `anonymous` are text of the schema (in a module, outside of all), `argument`
        fills a parameter, `document` and `text` come from the prompt, `mark` from the chat template
        and is the only kind whose special tokens count.
    start: position of the first token. home: where the schema puts it, whichever positions were
        asked for; None for what has no place there.
    owner: path of the module or slot. name: of the parameter or document.
    is_reusable: whether its state may come from a store; False computes it for each prompt.
    """

    kind: RunKind
    text: str
    token_ids: tuple[int, ...]
    start: int
    home: int | None
    owner: ModulePath
    name: str | None
    role: RoleName | None
    is_reusable: bool

    @property
    def stop(self) -> int:
        """One behind the last position."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Resolution:
    """A prompt, ready to be run.

    runs: in the order in which computed tokens see what is before them. Positions may leave gaps,
        and with the schema's positions text between modules may share positions with what follows.
    scaffolds: sets of modules, all used, that are encoded together; no module is in two.
    """

    runs: tuple[TokenRun, ...]
    scaffolds: tuple[tuple[ModulePath, ...], ...]

    @property
    def text(self) -> str:
        """What the model reads."""
        return "".join(run.text for run in self.runs)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of all runs, joined."""
        return tuple(token for run in self.runs for token in run.token_ids)

    @property
    def position_ids(self) -> tuple[int, ...]:
        """Of all runs, joined."""
        return tuple(position for run in self.runs for position in range(run.start, run.stop))


def resolve(
    layout: SchemaLayout,
    prompt: PromptTree,
    *,
    positions: Positions = "schema",
) -> Resolution:
    """Work out a prompt against its schema's layout.

    positions: `schema`: those of the layout, gaps where modules are left out; text between modules
        begins where the module before it ends, text at the end behind all positions in use.
        `compact`: one after the other from the layout's first.
    Raises: PMLError: the prompt doesn't fit the schema, is empty, or has messages in an order that
        the chat template can't render. OptionError: unknown `positions`.
    """
    if positions not in get_args(Positions):
        raise OptionError(
            f"unknown positions {positions!r}; use one of {', '.join(get_args(Positions))}"
        )
    ordered = in_order(layout, prompt, positions)
    if not ordered.runs:
        raise error_at(
            prompt.source, prompt.line, "the prompt is empty; use a module or write some text"
        )
    pieces = _with_marks(ordered.runs, layout.marks, prompt)
    place = _schema_positions if positions == "schema" else _compact_positions
    starts = place(pieces, layout.start)
    runs = tuple(_run(piece, start) for piece, start in zip(pieces, starts, strict=True))
    return Resolution(runs, _scaffolds(layout, ordered.used))


def _run(piece: UnplacedRun, start: int) -> TokenRun:
    return TokenRun(
        piece.kind,
        piece.text,
        piece.token_ids,
        start,
        piece.home,
        piece.owner,
        piece.name,
        None if piece.message is None else piece.message.role,
        piece.is_reusable,
    )


def _with_marks(
    pieces: Sequence[UnplacedRun], marks: Marks, prompt: PromptTree
) -> list[UnplacedRun]:
    """Put the chat template's marks where messages begin, and at the end.

    In a prompt with messages, what stands beside them belongs to the user's message before it, or
    else to the user's message behind it, or else is one of its own.
    """
    if all(piece.message is None for piece in pieces):
        return list(pieces)
    written: list[UnplacedRun] = []
    current: Message = None
    implied: Message = None
    opened: set[int] = set()
    for piece in pieces:
        message = piece.message
        if message is None:
            if current is None or current.role != "user":
                implied = Turn("user")
                message = implied
            else:
                message = current
        joins = current is not None and current is implied and message.role == "user"
        if message is not current and not joins:
            mark = _mark(marks, current, message, prompt)
            if isinstance(message, PlacedRole) and id(message) not in opened:
                mark = replace(mark, home=message.start, begins=message.start)
            elif piece.home is None and mark.token_ids:
                mark = replace(mark, begins=piece.begins, is_last=piece.is_last)
                piece = replace(piece, begins=None)
            written.append(mark)
        opened.add(id(message))
        current = message
        written.append(replace(piece, message=message))
    written.append(replace(_mark(marks, current, None, prompt), is_last=True))
    return [piece for piece in written if piece.token_ids]


def _mark(marks: Marks, before: Message, after: Message, prompt: PromptTree) -> UnplacedRun:
    roles = [None if message is None else message.role for message in (before, after)]
    mark = marks(*roles)
    if mark is None:
        names = ["the beginning" if roles[0] is None else f"<{roles[0]}>"]
        names.append("the answer" if roles[1] is None else f"<{roles[1]}>")
        raise error_at(
            prompt.source,
            after.line if isinstance(after, Turn) and after.line else prompt.line,
            f"the model's chat template has no {names[1]} behind {names[0]}; put the messages in "
            "another order",
        )
    return UnplacedRun("mark", mark.text, mark.token_ids, (), after)


def _schema_positions(pieces: Sequence[UnplacedRun], first: int) -> list[int]:
    """Start of each piece: its own, or behind the piece before it, or behind all."""
    starts = []
    end = largest = first
    for piece in pieces:
        begins = end if piece.begins is None else piece.begins
        start = largest if piece.is_last else begins
        starts.append(start)
        end = start + len(piece.token_ids)
        largest = max(largest, end)
    return starts


def _compact_positions(pieces: Sequence[UnplacedRun], first: int) -> list[int]:
    """Start of each piece: behind the one before it."""
    lengths = (len(piece.token_ids) for piece in pieces)
    return list(accumulate(lengths, initial=first))[:-1]


def _scaffolds(
    layout: SchemaLayout, used: frozenset[ModulePath]
) -> tuple[tuple[ModulePath, ...], ...]:
    """Scaffolds whose modules are all used, the largest first; none that shares a module."""
    found: list[tuple[ModulePath, ...]] = []
    taken: set[ModulePath] = set()
    for scaffold in sorted(layout.scaffolds, key=len, reverse=True):
        if used.issuperset(scaffold) and taken.isdisjoint(scaffold):
            taken.update(scaffold)
            found.append(scaffold)
    return tuple(found)
