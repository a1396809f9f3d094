"""Names for modules and parameters: readable, valid in XML, the same in every process."""

from __future__ import annotations

import re
from collections.abc import Iterable

_MAX_CHARS = 40
# The names of PML: those of XML without the colon and the rarest letters.
_NOT_NAME_CHARS = re.compile(
    "[^-.0-9A-Z_a-z\xb7\xc0-\xd6\xd8-\xf6\xf8-\u037d\u037f-\u1fff\u2070-\u218f\u2c00-\u2fef"
    "\u3001-\ud7ff]+"
)
_HYPHENS = re.compile("-{2,}")
# What may stand inside a name, but not begin it; names that begin with "xml" belong to XML.
_NOT_FIRST = re.compile("[-.0-9\xb7\u0300-\u036f]|xml", re.IGNORECASE)


def xml_name(words: str | Iterable[str], otherwise: str = "value") -> str:
    """A name made of `words`, joined by hyphens; `otherwise` if nothing of them is left."""
    text = words if isinstance(words, str) else "-".join(words)
    name = _HYPHENS.sub("-", _NOT_NAME_CHARS.sub("-", text))[:_MAX_CHARS].strip("-.")
    if not name:
        return otherwise
    return f"_{name}" if _NOT_FIRST.match(name) else name


class UniqueNames:
    """Gives out every name once: the second `else` is `else-2`."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, name: str) -> str:
        """`name`, or the first of `name-2`, `name-3`, … that is free."""
        free, number = name, 1
        while free in self._taken:
            number += 1
            free = f"{name}-{number}"
        self._taken.add(free)
        return free
