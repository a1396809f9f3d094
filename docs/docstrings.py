"""Reads this project's docstrings for the API pages: a griffe extension that `mkdocs.yml` names.

They are Markdown with three habits, which plain Markdown would run together:

- `name: what it is`, on a line of its own, tells of a parameter or an attribute: a list item here;
- `Raises: SomeError: when` begins a paragraph;
- a name in backticks that has a place on an API page is a link to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from griffe import Docstring, Extension, Object

_PAGES = Path(__file__).parent / "api"
_ITEM = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): ")
_RAISES = re.compile(r"(Raises|Returns): ")
_ERROR = re.compile(r"\b([A-Z]\w*Error)\b(?!`)")
_NAME = re.compile(r"(?<![`\[])`([A-Za-z_.]+)`(?![`\]])")


def known_names() -> dict[str, str]:
    """Last part of every identifier on the API pages → the identifier."""
    pages = (page.read_text("utf-8") for page in sorted(_PAGES.glob("*.md")))
    identifiers = (line for page in pages for line in re.findall(r"^::: (\S+)", page, re.MULTILINE))
    return {identifier.rpartition(".")[2]: identifier for identifier in identifiers}


class HouseDocstrings(Extension):
    """Rewrites docstrings as Markdown that reads on a page as it does in the source."""

    def __init__(self) -> None:
        self._names = known_names()

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Called for every object that griffe has read."""
        if obj.docstring is not None:
            obj.docstring = Docstring(
                "\n".join(self._lines(obj.docstring.value)), parent=obj, parser=None
            )

    def _lines(self, text: str) -> Iterator[str]:
        is_code, in_item = False, False
        for line in text.splitlines():
            if line.lstrip().startswith("```"):
                is_code = not is_code
            if is_code or not line.strip():
                in_item = in_item and is_code
                yield line
                continue
            item = _ITEM.match(line)
            if _RAISES.match(line):
                yield ""
                line = _RAISES.sub(r"**\1:** ", _ERROR.sub(r"`\1`", line))
                in_item = False
            elif item is not None:
                if not in_item:
                    yield ""
                names = ", ".join(f"`{name}`" for name in item[1].split(", "))
                line, in_item = f"- **{names}**: {line[item.end() :]}", True
            elif in_item and line.startswith(" "):
                line = f"  {line.strip()}"
            elif in_item:
                yield ""
                in_item = False
            yield self._linked(line)

    def _linked(self, line: str) -> str:
        def link(found: re.Match[str]) -> str:
            identifier = self._names.get(found[1])
            return f"[{found[0]}][{identifier}]" if identifier else found[0]

        return _NAME.sub(link, line)
