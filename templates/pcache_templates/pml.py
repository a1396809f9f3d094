"""Schemas, and rendered prompts that use them, written as PML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from os.path import commonprefix
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from pcache_core.errors import TemplateError
from pcache_core.pml.nodes import (
    Module,
    Param,
    Role,
    Scaffold,
    Schema,
    SchemaNode,
    Slot,
    Text,
    Union,
    children_of,
)
from pcache_templates.trace import SpanKind, Traced, place_of
from pcache_templates.tree import Path, Place

# Production 2 of XML 1.0: neither as they are nor as references can these be in a document.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_pml(schema: Schema) -> str:
    """Write a schema, its texts character for character.

    White space between tags would be part of every prompt, so lines break inside of the tags.

    Raises: TemplateError: text holds a character that XML can't.
    """
    return _element(schema, "\n")[2:] + ">\n"


def _element(node: Schema | SchemaNode, line: str) -> str:
    """Write an element, from the `>` of the tag before it to its own, which is left out.

    line: a line break and the element's indentation.
    """
    children = children_of(node)
    if not children or any(isinstance(child, Text | Param) for child in children):
        return f"{line}>{_inline(node)[:-1]}"
    tag, attributes = _tag(node)
    inside = "".join(_element(child, line + "  ") for child in children)
    return f"{line}><{tag}{attributes}{inside}{line}></{tag}"


def _inline(node: Schema | SchemaNode) -> str:
    """Write a node without line breaks of our own."""
    if isinstance(node, Text):
        return xml_text(node.text)
    tag, attributes = _tag(node)
    if isinstance(node, Param):
        return f"<{tag}{attributes}/>"
    return f"<{tag}{attributes}>{''.join(map(_inline, children_of(node)))}</{tag}>"


def _tag(node: Schema | SchemaNode) -> tuple[str, str]:
    """Return the name of a node's tag, and its attributes as they are written."""
    match node:
        case Schema():
            return "schema", _attributes({"name": node.name, "xml:space": "preserve"})
        case Module():
            cache = None if node.cache else "false"
            return "module", _attributes({"name": node.name, "cache": cache})
        case Union():
            return "union", _attributes({"scaffold": node.scaffold})
        case Slot():
            return "slot", _attributes({"name": node.name, "max-tokens": node.max_tokens})
        case Param():
            size = {"len": node.length, "scaffold": node.scaffold}
            return "param", _attributes({"name": node.name, **size})
        case Scaffold():
            return "scaffold", _attributes({"modules": " ".join(node.modules)})
        case Role():
            return node.role, ""
    raise AssertionError("a text has no tag")


def _attributes(given: Mapping[str, str | int | None]) -> str:
    """Write attributes, those that are None left out."""
    written = ((name, str(value)) for name, value in given.items() if value is not None)
    return "".join(f" {name}={quoteattr(_checked(value))}" for name, value in written)


def xml_text(text: str) -> str:
    """Escape text. Raises: TemplateError: it holds a character that XML can't."""
    # A parser would read a carriage return as a line feed.
    return escape(_checked(text), {"\r": "&#13;"})


def _checked(text: str) -> str:
    if found := _NOT_XML.search(text):
        raise TemplateError(
            f"the text {text[max(found.start() - 10, 0) : found.end() + 10]!r} "
            f"holds U+{ord(found.group()):04X}, which XML can't hold; take it out"
        )
    return text


class _Written(NamedTuple):
    """A stretch of the prompt. owner: the module or slot that it belongs to."""

    owner: str
    place: Place
    kind: SpanKind
    text: str


def to_prompt_pml(schema: Schema, places: Mapping[Path, Place], traced: Traced) -> str:
    """Write a rendered prompt as one that uses `schema`.

    Raises: TemplateError: the prompt is none of the schema's, for example as a part of it could not
        be traced, or it holds a character that XML can't.
    """
    ways = dict(_ways(schema, ()))
    opened: tuple[str, ...] = ()
    used: set[str] = set()
    start = _attributes({"schema": schema.name, "xml:space": "preserve"})
    pml = [f"<prompt{start}>"]
    for owner, group in groupby(_stretches(schema, places, traced), key=lambda part: part.owner):
        around, node = ways[owner]
        shared = len(commonprefix([opened, around]))
        pml += [f"</{name}>" for name in reversed(opened[shared:])]
        pml += [f"<{name}>" for name in around[shared:]]
        fresh = {*around[shared:], owner}
        if fresh & used:
            raise TemplateError(
                f"the prompt has module {sorted(fresh & used)[0]!r} twice; a prompt uses it once"
            )
        used |= fresh
        opened = around
        parts = list(group)
        pml.append(_fill(node, parts) if isinstance(node, Slot) else _use(node, parts))
    pml += [f"</{name}>" for name in reversed(opened)]
    return "".join([*pml, "</prompt>\n"])


def _ways(
    node: Schema | SchemaNode, around: tuple[str, ...]
) -> Iterator[tuple[str, tuple[tuple[str, ...], Module | Slot]]]:
    """Yield every module and slot by name, with the names of the modules around it."""
    if isinstance(node, Module | Slot):
        yield node.name, (around, node)
        around = (*around, node.name)
    for child in children_of(node):
        yield from _ways(child, around)


def _stretches(schema: Schema, places: Mapping[Path, Place], traced: Traced) -> Iterator[_Written]:
    for span, text in traced.cut():
        place = place_of(span.path, places)
        if place is not None:
            kind: SpanKind = place.kind if span.kind == "argument" else span.kind
            yield _Written(place.slot or place.module, place, kind, text)
        elif text:
            raise TemplateError(f"{text[:40]!r} has no place in schema {schema.name!r}")


def _use(module: Module, parts: Sequence[_Written]) -> str:
    """Write a module whose parameters take what was written in their places."""
    arguments = {child.name: "" for child in module.children if isinstance(child, Param)}
    for part in parts:
        if part.place.param is not None:
            arguments[part.place.param] += part.text
    expected = "".join(
        child.text if isinstance(child, Text) else arguments[child.name]
        for child in module.children
        if isinstance(child, Text | Param)
    )
    if expected != "".join(part.text for part in parts):
        raise TemplateError(f"the prompt does not hold all of module {module.name!r}")
    return f"<{module.name}{_attributes(arguments)}/>"


def _fill(slot: Slot, parts: Iterable[_Written]) -> str:
    """Write a slot with documents, and what was written around them."""
    inside = "".join(
        f"<document>{xml_text(part.text)}</document>"
        if part.kind == "document" and part.text
        else xml_text(part.text)
        for part in parts
    )
    return f"<{slot.name}>{inside}</{slot.name}>"
