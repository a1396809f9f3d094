"""Schemas written as PML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from xml.sax.saxutils import escape, quoteattr

from pcache_core.errors import TemplateError
from pcache_templates.schema import Module, Node, Param, Role, Schema, Slot, Text, Union

# Production 2 of XML 1.0: neither as they are nor as references can these be in a document.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_pml(schema: Schema) -> str:
    """Write a schema. Text is written as it is: between two tags of one module nothing is added.

    Raises: TemplateError: text holds a character that XML can't.
    """
    lines = [f"<schema name={quoteattr(schema.name)}>"]
    lines += _lines(schema.children, "  ")
    return "\n".join([*lines, "</schema>\n"])


def _lines(nodes: Iterable[Node], indent: str) -> Iterator[str]:
    for node in nodes:
        match node:
            case Module() if all(isinstance(child, Text | Param) for child in node.children):
                inline = "".join(map(_inline, node.children))
                yield f"{indent}<module name={quoteattr(node.name)}>{inline}</module>"
            case Module():
                yield f"{indent}<module name={quoteattr(node.name)}>"
                yield from _lines(node.children, indent + "  ")
                yield f"{indent}</module>"
            case Union():
                yield f"{indent}<union>"
                yield from _lines(node.members, indent + "  ")
                yield f"{indent}</union>"
            case Role():
                yield f"{indent}<{node.name}>"
                yield from _lines(node.children, indent + "  ")
                yield f"{indent}</{node.name}>"
            case Slot():
                yield f"{indent}<slot name={quoteattr(node.name)}/>"
            case _:
                raise AssertionError("text and parameters are inside modules")


def _inline(node: Node) -> str:
    if isinstance(node, Param):
        return f'<param name={quoteattr(node.name)} len="{node.length}"/>'
    assert isinstance(node, Text)
    if found := _NOT_XML.search(node.text):
        raise TemplateError(
            f"the template's text {node.text[max(found.start() - 10, 0) : found.end() + 10]!r} "
            f"holds U+{ord(found.group()):04X}, which XML can't hold; take it out of the template"
        )
    # A parser would read a carriage return as a line feed.
    return escape(node.text, {"\r": "&#13;"})
