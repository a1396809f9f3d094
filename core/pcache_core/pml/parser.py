"""PML text to trees: strict XML, then the grammar, then the rules that a grammar can't say.

White space with a line break in it, at either end of a text, is layout: next to the tags of the
element that the text is in it is dropped, next to a child's tag it is one space. All other white
space is kept as written, and so is everything under `xml:space="preserve"`. Between chat messages,
white space alone is never text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, cast

from pcache_core.errors import PMLError
from pcache_core.pml.check import check_schema
from pcache_core.pml.grammar import GrammarName, grammar
from pcache_core.pml.markup import Chars, Element, Limits, Markup, read_markup
from pcache_core.pml.nodes import (
    ROLES,
    Document,
    Module,
    ModuleUse,
    Param,
    PromptNode,
    PromptTree,
    Role,
    RoleName,
    Scaffold,
    Schema,
    SchemaNode,
    Slot,
    Text,
    Turn,
    Union,
)
from pcache_core.pml.source import Source, SourceFolder, read_source

DEFAULT_LIMITS = Limits()
SpaceRule = Literal["schema", "prompt", "preserve"]
"""What white space counts: as in a schema, as in a prompt, all."""

_SPACE = " \t\n"
_SILENT = (*ROLES, "scaffold")


def parse_schema(
    text: str | bytes,
    *,
    file: str | None = None,
    src_root: str | os.PathLike[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Schema:
    """Read a `<schema>`.

    file: what messages call the text. src_root: the folder that `src=` may read from; without it
        `src=` is refused.
    Raises: PMLError: not well-formed, not in the grammar (`schema.rng`), breaks a rule, or is over
        a limit.
    """
    markup = _read(text, file, limits, "schema")
    source, root = markup.source, markup.root
    left = limits.max_bytes - len(source.text.encode())
    folder = None if src_root is None else SourceFolder(src_root, left)
    reader = _SchemaReader(source, folder)
    children = reader.children(root, _space_rule(root, "schema", "schema"))
    schema = Schema(root.attributes["name"], children, root.line, source)
    check_schema(schema)
    return schema


def parse_prompt(
    text: str | bytes, *, file: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> PromptTree:
    """Read a `<prompt>`. Whether it fits its schema is seen when it is resolved against it.

    Raises: PMLError: not well-formed, not in the grammar (`prompt.rng`), or over a limit.
    """
    markup = _read(text, file, limits, "prompt")
    root = markup.root
    arguments = _arguments(root)
    name = arguments.pop("schema")
    children = tuple(_prompt_children(root, _space_rule(root, "prompt", "prompt")))
    return PromptTree(name, children, arguments, root.line, markup.source)


def _read(text: str | bytes, file: str | None, limits: Limits, name: GrammarName) -> Markup:
    """Parse and check in a thread of its own.

    libxml2 keeps every name that a thread has read until the thread ends; in one that lives on,
    each new name in a prompt would stay in memory for good.
    """

    def read() -> Markup:
        markup = read_markup(read_source(text, file, limits.max_bytes), limits)
        grammar(name).check(markup)
        return markup

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(read).result()


class _SchemaReader:
    """Elements of a schema to nodes."""

    def __init__(self, source: Source, folder: SourceFolder | None) -> None:
        self._source = source
        self._folder = folder

    def children(self, element: Element, space: SpaceRule) -> tuple[SchemaNode, ...]:
        """Return what an element holds, in order; texts are never empty."""
        return tuple(
            part if isinstance(part, Text) else self._node(part, space, is_apart=is_apart)
            for part, is_apart in _parts(element, space)
        )

    def _node(self, element: Element, space: SpaceRule, *, is_apart: bool) -> SchemaNode:
        given, line = element.attributes, element.line
        space = _space_rule(element, space, "schema")
        match element.tag:
            case "module":
                return self._module(element, space)
            case "union":
                modules = [part for part in element.parts if isinstance(part, Element)]
                members = (self._module(m, _space_rule(m, space, "schema")) for m in modules)
                return Union(tuple(members), given.get("scaffold"), line)
            case "slot":
                return Slot(given["name"], self._tokens(element, "max-tokens"), line)
            case "scaffold":
                return Scaffold(tuple(given["modules"].split()), line)
            case "param" | "parameter":
                length = self._tokens(element, "len") or self._tokens(element, "length")
                return Param(given["name"], length or 0, given.get("scaffold"), line)
            case _:
                role = cast(RoleName, element.tag)  # the grammar allows nothing else
                return Role(role, self.children(element, space), line, is_apart)

    def _module(self, element: Element, space: SpaceRule) -> Module:
        given, line = element.attributes, element.line
        children = self.children(element, space)
        if "src" in given:
            text = _kept(self._included(given["src"], line), None, None, space)
            children = (Text(text, line), *children) if text else children
        return Module(given["name"], children, given.get("cache") != "false", line)

    def _included(self, name: str, line: int) -> str:
        if self._folder is None:
            raise self._source.error(
                "src= is off; give parse_schema(src_root=...) the folder it may read from", line
            )
        try:
            return self._folder.read(name)
        except PMLError as error:
            raise self._source.error(str(error), line) from None

    def _tokens(self, element: Element, name: str) -> int | None:
        value = element.attributes.get(name)
        if value is None:
            return None
        digits = value.strip().removeprefix("+").lstrip("0")
        if len(digits) > 9:
            raise self._source.error(f"{name}= is over a billion tokens; lower it", element.line)
        return int(digits)


def _prompt_children(element: Element, space: SpaceRule) -> Iterator[PromptNode]:
    for part, is_apart in _parts(element, space):
        if isinstance(part, Text):
            yield part
            continue
        inside = tuple(_prompt_children(part, _space_rule(part, space, "prompt")))
        if part.tag == "document":
            text = "".join(node.text for node in inside if isinstance(node, Text))
            yield Document(text, part.attributes.get("name"), part.line)
        elif part.tag in ROLES:
            yield Turn(part.tag, inside, part.line, is_apart)
        else:
            yield ModuleUse(part.tag, _arguments(part), inside, part.line)


def _parts(element: Element, space: SpaceRule) -> Iterator[tuple[Text | Element, bool]]:
    """Yield child elements, and texts without the white space that is only layout.

    With each, whether white space stands beside the tags of the child.
    """
    parts = [None, *element.parts, None]
    for before, part, after in zip(parts, element.parts, parts[2:], strict=False):
        if isinstance(part, Chars):
            if text := _kept(part.text, _tag(before), _tag(after), space):
                yield Text(text, part.line), False
            continue
        beside = (_edges(before)[1], _edges(after)[0])
        inside = (_edges(part.parts[0])[0], _edges(part.parts[-1])[1]) if part.parts else ()
        yield part, any(edge in _SPACE for edge in (*beside, *inside) if edge)


def _tag(part: Element | Chars | None) -> str | None:
    return part.tag if isinstance(part, Element) else None


def _edges(part: Element | Chars | None) -> tuple[str, str]:
    """Return the first and the last character of a text."""
    return (part.text[0], part.text[-1]) if isinstance(part, Chars) else ("", "")


def _space_rule(element: Element, inherited: SpaceRule, default: SpaceRule) -> SpaceRule:
    """Return the rule that `xml:space` sets for an element."""
    asked = element.attributes.get("xml:space")
    return "preserve" if asked == "preserve" else default if asked == "default" else inherited


def _arguments(element: Element) -> dict[str, str]:
    return {name: value for name, value in element.attributes.items() if name != "xml:space"}


def _kept(text: str, before: str | None, after: str | None, rule: SpaceRule) -> str:
    """Return what of a text counts. before, after: tags beside it; None for the one around it."""
    core = text.strip(_SPACE)
    if rule == "preserve":
        return "" if not core and (before in ROLES or after in ROLES) else text
    if not core:
        if before in _SILENT or after in _SILENT:
            return ""
        if "\n" not in text:
            return text
        # Children of a schema are words apart; to a prompt, the schema gives the space.
        return " " if rule == "schema" and before and after else ""
    length = len(text) - len(text.lstrip(_SPACE))
    leading, trailing = text[:length], text[length + len(core) :]
    return _edge(leading, before) + core + _edge(trailing, after)


def _edge(space: str, neighbour: str | None) -> str:
    if "\n" not in space:
        return space
    return " " if neighbour and neighbour not in ROLES else ""
