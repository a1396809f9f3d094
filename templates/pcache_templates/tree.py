"""The tree that every kind of template compiles into, before a schema is made of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, NamedTuple

# A place in a template: the way to it from the outside in, for example (macro call, text 3).
Path = tuple[Hashable, ...]
ValueKind = Literal["argument", "document"]
NodeKind = Literal["text", "param", "module", "union", "slot", "role"]

# As many elements as PML may have. Macros that call macros could write many more.
MAX_NODES = 20_000
_MAX_NAME_CHARS = 40
# The names of PML: those of XML without the colon and the rarest letters.
_NOT_NAME_CHARS = re.compile(
    "[^-.0-9A-Z_a-z\xb7\xc0-\xd6\xd8-\xf6\xf8-\u037d\u037f-\u1fff\u2070-\u218f\u2c00-\u2fef"
    "\u3001-\ud7ff]+"
)
_HYPHENS = re.compile("-{2,}")
# What may stand inside a name, but not begin it; names that begin with "xml" belong to XML.
_NOT_FIRST = re.compile("[-.0-9\xb7\u0300-\u036f]|xml", re.IGNORECASE)


class Place(NamedTuple):
    """What the schema calls a place in the template.

    param: None for the module's own text. slot: the one that the place is written into.
    """

    module: str
    param: str | None = None
    kind: ValueKind = "argument"
    slot: str | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A part of a template, called as in PML.

    content: the text of a text; the name of any other part, a role's among them.
    parts: what a module, union, slot or role holds; in a slot, what is written there each time.
    origin: the place that writes a text, a parameter or a slot.
    kind_of_value: `document` if the parameter is one of many that a loop goes through.
    """

    kind: NodeKind
    content: str = ""
    parts: tuple[Node, ...] = ()
    origin: Path = ()
    kind_of_value: ValueKind = "argument"

    @property
    def is_leaf(self) -> bool:
        """Whether it is a text or a parameter."""
        return self.kind in ("text", "param")

    def moved(self, path: Path) -> Node:
        """Return the same part, its places inside of `path`."""
        parts = tuple(part.moved(path) for part in self.parts)
        return replace(self, parts=parts, origin=path + self.origin)


def walk(parts: Iterable[Node]) -> Iterator[Node]:
    """Yield every part below, outer before inner."""
    for part in parts:
        yield part
        yield from walk(part.parts)


def are_too_many(parts: Iterable[Node]) -> bool:
    """Tell whether there are more parts than a schema may have."""
    return next(islice(walk(parts), MAX_NODES, None), None) is not None


def turns_only(parts: Iterable[Node]) -> list[Node]:
    """Return the tree without what is written outside of its roles."""
    holders = [part for part in parts if any(below.kind == "role" for below in walk([part]))]
    return [
        replace(part, parts=tuple(turns_only(part.parts)))
        if part.kind in ("module", "union")
        else part
        for part in holders
    ]


def stripped(turn: Iterable[Node]) -> tuple[Node, ...]:
    """Return a turn without white space around it."""
    from_behind = _lstripped(reversed(_lstripped(turn, str.lstrip)), str.rstrip)
    return tuple(reversed(from_behind))


def _lstripped(turn: Iterable[Node], strip: Callable[[str], str]) -> list[Node]:
    kept: list[Node] = []
    for part in turn:
        if part.kind == "text" and not kept:
            part = replace(part, content=strip(part.content))
        if part.kind != "text" or part.content or kept:
            kept.append(part)
    return kept


def xml_name(words: str | Iterable[str], otherwise: str = "value") -> str:
    """Make a readable name that is valid in XML and the same in every process.

    words: joined by hyphens. otherwise: the name if nothing of them is left.
    """
    text = words if isinstance(words, str) else "-".join(words)
    name = _HYPHENS.sub("-", _NOT_NAME_CHARS.sub("-", text))[:_MAX_NAME_CHARS].strip("-.")
    if not name:
        return otherwise
    return f"_{name}" if _NOT_FIRST.match(name) else name
