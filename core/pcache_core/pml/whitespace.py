"""Which white space is text and which is the layout of the file.

White space with a line break in it, at either end of a text, is layout: next to the tags of the
element that the text is in it is dropped, next to a child's tag it is one space. All other white
space is kept as written, and so is everything under `xml:space="preserve"`. Between chat messages,
white space alone is never text.
"""

from __future__ import annotations

from collections.abc import Callable

from pcache_core.pml.nodes import ROLES

SpaceRule = Callable[[str, str | None, str | None], str]
"""From a text and the tags of its neighbours (None: of the element that holds it) to its text."""

_SPACE = " \t\n"
_SILENT = (*ROLES, "scaffold")


def in_schema(text: str, before: str | None, after: str | None) -> str:
    """White space with a line break between two children is one space: they are words apart."""
    return _kept(text, before, after, between=" ")


def in_prompt(text: str, before: str | None, after: str | None) -> str:
    """White space with a line break between two children is nothing: the schema has its own."""
    return _kept(text, before, after, between="")


def as_written(text: str, before: str | None, after: str | None) -> str:
    """All white space is text, except between chat messages."""
    between_messages = before in ROLES or after in ROLES
    return "" if between_messages and not text.strip(_SPACE) else text


def _kept(text: str, before: str | None, after: str | None, *, between: str) -> str:
    core = text.strip(_SPACE)
    if not core:
        if before in _SILENT or after in _SILENT:
            return ""
        if "\n" not in text:
            return text
        return between if before and after else ""
    length = len(text) - len(text.lstrip(_SPACE))
    leading, trailing = text[:length], text[length + len(core) :]
    return _edge(leading, before) + core + _edge(trailing, after)


def _edge(space: str, neighbour: str | None) -> str:
    if "\n" not in space:
        return space
    return " " if neighbour and neighbour not in ROLES else ""
