"""Texts that match the patterns and formats of a JSON schema: where to look for a short document.

What a pattern wants can't be seen from the tokens that may come next (`a` may be any letter of a
text before the part that matches), so a search needs to be told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parser  # type: ignore[attr-defined]
from typing import Any

# Others are found without help.
_FORMATS = {
    "email": "a@b.co",
    "idn-email": "a@b.co",
    "date": "2000-01-01",
    "date-time": "2000-01-01T00:00:00Z",
}
_PATTERN = re.compile(r'"pattern"\s*:\s*("(?:\\.|[^"\\])*")')
_SAMPLES: dict[object, str] = {
    sre.CATEGORY_DIGIT: "0",
    sre.CATEGORY_WORD: "a",
    sre.CATEGORY_SPACE: " ",
}
_PRINTABLE = [chr(code) for code in range(48, 127)] + [chr(code) for code in range(32, 48)]


def witnesses(grammar: str) -> list[str]:
    """A text for each `pattern` and some `format`s, as written inside a JSON string.

    grammar: its source.

    Patterns that Python reads otherwise or not at all are left out.
    """
    formats = [text for name, text in _FORMATS.items() if f'"{name}"' in grammar]
    return [json.dumps(text)[1:-1] for text in (*formats, *_texts(grammar))]


def _texts(grammar: str) -> Iterator[str]:
    for quoted in dict.fromkeys(_PATTERN.findall(grammar)):
        try:
            pattern = json.loads(quoted)
            text = "".join(_shortest(item) for item in sre_parser.parse(pattern))
            if re.search(pattern, text):
                yield text
        except (re.error, ValueError, NotImplementedError, RecursionError, OverflowError):
            continue


def _shortest(item: tuple[Any, Any]) -> str:
    """A short text for one part of a parsed pattern."""
    kind, value = item
    if kind is sre.LITERAL:
        return chr(value)
    if kind in (sre.ANY, sre.NOT_LITERAL):
        return "0" if value != ord("0") else "1"
    if kind is sre.IN:
        return _member(value)
    if kind is sre.BRANCH:
        return min((_joined(branch) for branch in value[1]), key=len)
    if kind is sre.SUBPATTERN:
        return _joined(value[-1])
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        fewest, _, repeated = value
        return _joined(repeated) * int(fewest)
    if kind is sre.AT:
        return ""
    raise NotImplementedError(kind)


def _joined(items: Iterable[tuple[Any, Any]]) -> str:
    return "".join(_shortest(item) for item in items)


def _member(items: list[tuple[Any, Any]]) -> str:
    """A character of a set."""
    if items[0][0] is sre.NEGATE:
        return next(char for char in _PRINTABLE if not any(_holds(i, char) for i in items[1:]))
    kind, value = items[0]
    if kind is sre.LITERAL:
        return chr(value)
    if kind is sre.RANGE:
        return chr(value[0])
    if value in _SAMPLES:
        return _SAMPLES[value]
    raise NotImplementedError(kind)


def _holds(item: tuple[Any, Any], char: str) -> bool:
    kind, value = item
    if kind is sre.LITERAL:
        return ord(char) == int(value)
    if kind is sre.RANGE:
        return bool(value[0] <= ord(char) <= value[1])
    return bool(
        value is sre.CATEGORY_DIGIT
        and char.isdigit()
        or value is sre.CATEGORY_WORD
        and (char.isalnum() or char == "_")
        or value is sre.CATEGORY_SPACE
        and char.isspace()
    )
