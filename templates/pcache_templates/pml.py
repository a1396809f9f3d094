"""Schemas written as PML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

from pcache_core.errors import TemplateError
from pcache_templates.schema import Module, Node, Param, Role, Schema, Slot, Text, Union

# Production 2 of XML 1.0: neither as they are nor as references can these be in a document.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_pml(schema: Schema) -> str:
    """Write a schema, its texts character for character.

    White space between tags would be part of every prompt, so lines break inside of the tags.

    Raises: TemplateError: text holds a character that XML can't.
    """
    inner = "".join(_element(node, "\n  ") for node in schema.children)
    return f'<schema name={quoteattr(schema.name)} xml:space="preserve"{inner}\n></schema>\n'


def _element(node: Node, line: str) -> str:
    """An element, from the end of the tag before it to the `>` that it leaves out.

    line: a line break and the element's indentation.
    """
    match node:
        case Module() if all(isinstance(child, Text | Param) for child in node.children):
            inline = "".join(map(_inline, node.children))
            return f"{line}><module name={quoteattr(node.name)}>{inline}</module"
        case Module():
            return _around(node.children, "module", f" name={quoteattr(node.name)}", line)
        case Union():
            return _around(node.members, "union", "", line)
        case Role():
            return _around(node.children, node.name, "", line)
        case Slot():
            return f"{line}><slot name={quoteattr(node.name)}></slot"
        case _:
            raise AssertionError("text and parameters are inside modules")


def _around(children: Iterable[Node], tag: str, attributes: str, line: str) -> str:
    inner = "".join(_element(child, line + "  ") for child in children)
    return f"{line}><{tag}{attributes}{inner}{line}></{tag}"


def _inline(node: Node) -> str:
    if isinstance(node, Param):
        return f'<param name={quoteattr(node.name)} len="{node.length}"/>'
    assert isinstance(node, Text)
    return xml_text(node.text)


def xml_text(text: str) -> str:
    """Escape text. Raises: TemplateError: it holds a character that XML can't."""
    # A parser would read a carriage return as a line feed.
    return escape(_checked(text), {"\r": "&#13;"})


def xml_attribute(text: str) -> str:
    """Quote an attribute's value. Raises: as `xml_text` does."""
    return quoteattr(_checked(text))


def _checked(text: str) -> str:
    if found := _NOT_XML.search(text):
        raise TemplateError(
            f"the text {text[max(found.start() - 10, 0) : found.end() + 10]!r} "
            f"holds U+{ord(found.group()):04X}, which XML can't hold; take it out"
        )
    return text
