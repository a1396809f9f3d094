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
        """One after the last position."""
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
        begins where the module before it ends, text at the end after all positions in use.
        `compact`: one after the other from the layout's first.
    Raises: PMLError: the prompt doesn't fit the schema, is empty, or has messages in an order that
        the chat template can't render. OptionError: unknown `positions`.
    """
    if positions not in get_args(Positions):
        raise OptionError(
            f"unknown positions {positions!r}; use one of {', '.join(get_args(Positions))}"
        )
    unplaced, used = in_order(layout, prompt, positions)
    if not unplaced:
        raise error_at(
            prompt.source, prompt.line, "the prompt is empty; use a module or write some text"
        )
    unplaced = _with_marks(unplaced, layout, prompt)
    place = _schema_positions if positions == "schema" else _compact_positions
    starts = place(unplaced, layout.start)
    runs = tuple(_placed(run, start) for run, start in zip(unplaced, starts, strict=True))
    return Resolution(runs, _scaffolds(layout, used))


def _placed(run: UnplacedRun, start: int) -> TokenRun:
    role = None if run.message is None else run.message.role
    return TokenRun(
        run.kind, run.text, run.token_ids, start, run.home,
        run.owner, run.name, role, run.is_reusable,
    )  # fmt: skip


def _with_marks(
    runs: Sequence[UnplacedRun], layout: SchemaLayout, prompt: PromptTree
) -> list[UnplacedRun]:
    """Put the chat template's marks where messages begin, and at the end.

    In a prompt with messages, what stands beside them belongs to the user's message before it, or
    else to the user's message after it, or else is one of its own. White space beside the tags of
    a message that is joined so to another keeps their words apart, as between other children.
    """
    if all(run.message is None for run in runs):
        return list(runs)
    written: list[UnplacedRun] = []
    current: Message = None
    implied: Message = None
    before: Message = None  # of the run before, before it was taken into another's message
    opened: set[int] = set()
    for run in runs:
        message = run.message
        if message is None:
            if current is None or current.role != "user":
                implied = Turn("user")
                message = implied
            else:
                message = current
        border: UnplacedRun | None = None
        joins = current is not None and current is implied and message.role == "user"
        if message is not current and not joins:
            border = _mark(layout.marks, current, message, prompt)
            if isinstance(message, PlacedRole) and id(message) not in opened:
                border = replace(border, home=message.start)
        elif run.message is not before and _are_apart(before, written[-1], run):
            border = UnplacedRun("text", " ", tuple(layout.tokenise(" ")), (), message)
        if border is not None and border.token_ids:
            if border.home is None and run.home is None:
                border = replace(border, begins=run.begins, is_last=run.is_last)
                run = replace(run, begins=None)
            written.append(border)
        opened.add(id(message))
        current, before = message, run.message
        written.append(replace(run, message=message))
    end = _mark(layout.marks, current, None, prompt)
    return [*written, replace(end, is_last=True)] if end.token_ids else written


def _are_apart(before: Message, left: UnplacedRun, right: UnplacedRun) -> bool:
    """Tell whether only the white space beside a message's tag has kept two runs apart.

    before: the message that the left one was in.
    """
    is_laid_out = any(message and message.is_apart for message in (before, right.message))
    return is_laid_out and not (left.text[-1:].isspace() or right.text[:1].isspace())


def _mark(marks: Marks, before: Message, after: Message, prompt: PromptTree) -> UnplacedRun:
    roles = [None if message is None else message.role for message in (before, after)]
    mark = marks(*roles)
    if mark is None:
        names = ["the beginning" if roles[0] is None else f"<{roles[0]}>"]
        names.append("the answer" if roles[1] is None else f"<{roles[1]}>")
        raise error_at(
            prompt.source,
            after.line if isinstance(after, Turn) and after.line else prompt.line,
            f"the model's chat template has no {names[1]} after {names[0]}; put the messages in "
            "another order",
        )
    return UnplacedRun("mark", mark.text, mark.token_ids, (), after)


def _schema_positions(runs: Sequence[UnplacedRun], first: int) -> list[int]:
    """Return the start of each run: its home, or after the run before it, or after all."""
    starts = []
    end = largest = first
    for run in runs:
        begins = run.begins if run.home is None else run.home
        start = largest if run.is_last else end if begins is None else begins
        starts.append(start)
        end = start + len(run.token_ids)
        largest = max(largest, end)
    return starts


def _compact_positions(runs: Sequence[UnplacedRun], first: int) -> list[int]:
    """Return the start of each run: after the one before it."""
    lengths = (len(run.token_ids) for run in runs)
    return list(accumulate(lengths, initial=first))[:-1]


def _scaffolds(layout: SchemaLayout, used: set[ModulePath]) -> tuple[tuple[ModulePath, ...], ...]:
    """Scaffolds whose modules are all used, the largest first; none that shares a module."""
    found: list[tuple[ModulePath, ...]] = []
    taken: set[ModulePath] = set()
    for scaffold in sorted(layout.scaffolds, key=len, reverse=True):
        if used.issuperset(scaffold) and taken.isdisjoint(scaffold):
            taken.update(scaffold)
            found.append(scaffold)
    return tuple(found)
