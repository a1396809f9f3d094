"""Reads this project's docstrings for the API pages: a griffe extension that `mkdocs.yml` names.

They are Markdown with some habits, which plain Markdown would run together:

- `name: what it is`, on a line of its own, tells of a parameter or an attribute: a list item here;
- `Raises: SomeError: when` begins a paragraph;
- a line `Invoke:` before an indented block is a heading, and `>>>` begins code;
- a name in backticks that has a place on an API page is a link to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from griffe import Docstring, Extension, Function, Object

_PAGES = Path(__file__).parent / "api"
_ITEM = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): ")
_NEXT_ITEM = re.compile(r"(?<=[.;]) ([a-z_]\w*(?:, [a-z_]\w*)*): ")
_SECTION = re.compile(r"^([A-Z][\w ,-]*):\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE)
_SESSION = re.compile(r"^ *>>> .*(?:\n.*\S.*)*", re.MULTILINE)
_RAISES = re.compile(r"(Raises|Returns): ")
_ERROR = re.compile(r"\b([A-Z]\w*Error)\b(?!`)")
_NAME = re.compile(r"(?<![`\[])`([A-Za-z_.]+)`(?![`\]])")


def known_names() -> dict[str, str]:
    """Last part of every identifier on the API pages → the identifier."""
    pages = (page.read_text("utf-8") for page in sorted(_PAGES.glob("*.md")))
    identifiers = (line for page in pages for line in re.findall(r"^::: (\S+)", page, re.MULTILINE))
    return {identifier.rpartition(".")[2]: identifier for identifier in identifiers}


def names_in(obj: Object) -> set[str]:
    """Parameters and members of an object, and parameters of its constructor."""
    names = set(obj.members)
    for function in (obj, obj.members.get("__init__")):
        if isinstance(function, Function):
            names |= {parameter.name for parameter in function.parameters}
    return names


def one_a_line(text: str, names: set[str]) -> str:
    """The text with `name:` on a new line where it stands after another item in one line."""
    lines = []
    for line in text.splitlines():
        parts = [line]
        for found in reversed(list(_NEXT_ITEM.finditer(line))):
            if _ITEM.match(line) and names.issuperset(found[1].split(", ")):
                parts[:1] = [parts[0][: found.start()], parts[0][found.start() + 1 :]]
        lines += parts
    return "\n".join(lines)


def unfolded(text: str) -> str:
    """The text with each section, a line `Invoke:` before an indented block, under bold words."""
    return _SECTION.sub(lambda found: f"**{found[1]}**\n\n{dedent(found[2])}", text)


def fenced(text: str) -> str:
    """The text with interpreter sessions (`>>>` to the next empty line) as blocks of code."""
    return _SESSION.sub(lambda found: f"\n```pycon\n{dedent(found[0])}\n```", text)


class HouseDocstrings(Extension):
    """Rewrites docstrings as Markdown that reads on a page as it does in the source."""

    def __init__(self) -> None:
        self._names = known_names()

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Called for every object that griffe has read."""
        if obj.docstring is not None:
            text = fenced(unfolded(obj.docstring.value))
            text = one_a_line(text, names_in(obj))
            obj.docstring = Docstring("\n".join(self._lines(text)), parent=obj, parser=None)

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
