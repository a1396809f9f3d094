"""Marked values: which characters of a formatted prompt came from which variable.

A template is formatted once more with marked values. A marked value is the plain string in every
respect but one: written into a text, it brings brackets of private-use characters along. Brackets
carry a nonce that is drawn for each call, so that no value can forge one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pcache_core import Segment

_OPEN, _NAMED, _CLOSE = "\ue0f4", "\ue0f5", "\ue0f6"


class Marked(str):
    """A plain value whose `str()` and `format()`, which is what templates call, add brackets."""

    name: str
    nonce: str

    def __new__(cls, value: str, name: str, nonce: str) -> Marked:
        """Mark `value` as the content of the variable `name`."""
        marked = super().__new__(cls, value)
        marked.name = name
        marked.nonce = nonce
        return marked

    def __str__(self) -> str:
        return f"{_OPEN}{self.nonce}:{self.name}{_NAMED}{self[:]}{_CLOSE}{self.nonce};"

    def __format__(self, spec: str) -> str:
        return format(self[:], spec) if spec else str(self)


def _keeping_the_mark(name: str) -> Callable[..., Marked]:
    plain = getattr(str, name)

    def method(self: Marked, *args: Any, **kwargs: Any) -> Marked:
        return Marked(plain(self, *args, **kwargs), self.name, self.nonce)

    return method


# What template filters such as `{{ question | trim }}` call; their results stay marked.
for _name in (
    "strip", "lstrip", "rstrip", "upper", "lower", "title", "capitalize", "replace", "expandtabs",
):  # fmt: skip
    setattr(Marked, _name, _keeping_the_mark(_name))


def mark_deeply(value: Any, name: str, nonce: str) -> Any:
    """Mark the strings in `value`, through lists, tuples and dicts.

    Anything else is returned as it is: templates may count with a number or call an object.
    """
    if isinstance(value, str):
        return Marked(value, name, nonce)
    if isinstance(value, (list, tuple)):
        return [mark_deeply(item, f"{name}[{i}]", nonce) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: mark_deeply(item, f"{name}.{key}", nonce) for key, item in value.items()}
    return value


def read_marks(text: str, nonce: str) -> list[Segment]:
    """Cut a text at the brackets of `nonce`: `literal` outside of them, `argument` inside.

    Of nested brackets the innermost names the argument.
    """
    segments: list[Segment] = []
    names: list[str] = []
    position = 0
    brackets = re.compile(f"{_OPEN}{nonce}:([^{_NAMED}]*){_NAMED}|{_CLOSE}{nonce};")
    for bracket in brackets.finditer(text):
        segments.append(_segment(text[position : bracket.start()], names))
        position = bracket.end()
        if bracket.group(1) is not None:
            names.append(bracket.group(1))
        elif names:
            names.pop()
    segments.append(_segment(text[position:], names))
    return [segment for segment in segments if segment.text]


def _segment(text: str, names: list[str]) -> Segment:
    return Segment(text, "argument", names[-1]) if names else Segment(text, "literal")
