"""Strict XML to a plain tree of elements and text, each with its line.

Well-formed XML without a document type: no entities but the five of XML, nothing fetched, nothing
repaired, no namespaces but `xml:`. Comments and processing instructions are not there, CDATA is
text. Depth, size and number of elements are limited while reading, so memory is, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lxml import etree

from pcache_core.errors import OptionError, PMLError
from pcache_core.pml.source import Source, quoted, shortened

MAX_DEPTH = 200
_CHUNK_BYTES = 16 * 1024
_LIBXML_BYTES = 8 * 2**20  # beyond, libxml2 refuses long texts unless told otherwise
_NOT_SPACE = re.compile(r"[^ \t\n]")
_PROLOG = re.compile(r"(?:[ \t\n]++|<!--.*?-->|<\?.*?\?>)*+", re.DOTALL)
_XML = "{http://www.w3.org/XML/1998/namespace}"
_TAG = r"""<(?P<close>/)?[^\s/>"'!?][^>"']*(?:"[^"]*"[^>"']*|'[^']*'[^>"']*)*>"""
_MARKUP = re.compile(
    rf"(?P<tag>{_TAG})|<!--.*?-->|<\?.*?\?>|<!\[CDATA\[(?P<cdata>.*?)\]\]>", re.DOTALL
)
_REMEDIES = (
    ("invalid element name", "write &lt; for a literal '<', or put the text in <![CDATA[ … ]]>"),
    ("'<' not allowed in attributes", "write &lt; for a literal '<'"),
    ("EntityRef", "write &amp; for a literal '&'"),
    ("not defined", "only &lt; &gt; &amp; &apos; &quot; and &#…; are known"),
    ("tag mismatch", "close each element before the one around it"),
    ("Premature end", "close every element"),
    ("Extra content", "a file holds one element and nothing after it"),
    ("Document is empty", "expected an element"),
    ("Start tag expected", "expected an element"),
    ("']]>' not allowed", "write ]]&gt;"),
    ("invalid Char", "remove the control character"),
    ("out of allowed range", "remove the control character"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a schema or prompt may hold.

    max_bytes: of the text as UTF-8, included files counted in. max_depth: elements within one
        another, at most 200. max_elements: all of them, modules among them.
    max_attributes: of one element.

    Raises: OptionError: a limit is below 1 or, for depth, above 200.
    """

    max_bytes: int = 4 * 2**20
    max_depth: int = 64
    max_elements: int = 20_000
    max_attributes: int = 256

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name}={value!r} must be 1 or more")
        if self.max_depth > MAX_DEPTH:
            raise OptionError(f"max_depth={self.max_depth} is over {MAX_DEPTH}; flatten the schema")


@dataclass(frozen=True, slots=True)
class Chars:
    """Characters between two tags. line: of the first that is not white space."""

    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Element:
    """An element. attributes: `xml:space` under that name, others as written."""

    tag: str
    attributes: dict[str, str]
    line: int
    parts: list[Element | Chars] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Markup:
    """A document, twice: as our tree and as lxml's, for the grammar."""

    source: Source
    root: Element
    tree: etree._Element


def read_markup(source: Source, limits: Limits) -> Markup:
    """Parse a document.

    Raises: PMLError: not well-formed, has a document type or a namespace, or is over a limit.
    """
    prolog = _PROLOG.match(source.text)
    at = prolog.end() if prolog else 0
    if source.text[at : at + 9].upper() == "<!DOCTYPE":
        line = source.text.count("\n", 0, at) + 1
        raise source.error("a document type is not allowed; remove <!DOCTYPE …>", line)
    tree = _parsed(source, limits)
    return Markup(source, _converted(source, tree), tree)


def _parsed(source: Source, limits: Limits) -> etree._Element:
    """Return the tree of lxml, given up as soon as a limit is passed."""
    parser = etree.XMLPullParser(
        events=("start", "end"),
        encoding="utf-8",  # whatever the declaration says: the text is decoded already
        resolve_entities="internal",  # type: ignore[arg-type]  # there is no document type, so there are none
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        recover=False,
        remove_comments=True,
        remove_pis=True,
        huge_tree=limits.max_bytes > _LIBXML_BYTES,
    )
    data = source.text.encode()
    depth = elements = 0

    def count() -> None:
        nonlocal depth, elements
        for event, element in parser.read_events():
            if event != "start" or not isinstance(element, etree._Element):
                depth -= event == "end"
                continue
            depth += 1
            elements += 1
            attributes = len(element.attrib)
            for name, number, counted in (
                ("depth", depth, "elements within one another"),
                ("elements", elements, "elements"),
                ("attributes", attributes, "attributes on one element"),
            ):
                limit = getattr(limits, f"max_{name}")
                if number > limit:
                    raise source.error(
                        f"{number:,} {counted}, the limit is {limit:,}; simplify, or raise "
                        f"Limits(max_{name}=...)",
                        element.sourceline if isinstance(element.sourceline, int) else None,
                    )

    try:
        for start in range(0, len(data), _CHUNK_BYTES):
            parser.feed(data[start : start + _CHUNK_BYTES])
            count()
        tree = parser.close()
        count()
    except etree.LxmlError as error:
        raise _syntax_error(source, error) from None
    if tree.getroottree().docinfo.internalDTD is not None:
        raise source.error("a document type is not allowed; remove <!DOCTYPE …>", 1)
    return tree


def _syntax_error(source: Source, error: etree.LxmlError) -> PMLError:
    """Make an error of libxml2's message and what to do about it."""
    said = (getattr(error, "msg", None) or str(error)).split("\n")[0]
    said = re.sub(r", line \d+, column \d+.*", "", said)
    remedy = next((text for sign, text in _REMEDIES if sign in said), None)
    line = getattr(error, "lineno", None) or 1
    return source.error(
        f"not well-formed: {shortened(said, 120)}" + (f"; {remedy}" if remedy else ""), line
    )


def _converted(source: Source, tree: etree._Element) -> Element:
    lines = _lines(source.text)
    next(lines)  # of what stands before the outermost element

    def convert(node: etree._Element) -> Element:
        line = next(lines)
        tag = _local(source, line, node.tag)
        given = {_local(source, line, name): str(value) for name, value in node.attrib.items()}
        element = Element(tag, given, line)

        def add(text: str | None) -> None:
            text_line = next(lines) or line
            if text:
                element.parts.append(Chars(text, text_line))

        add(node.text)
        for child in node:
            element.parts.append(convert(child))
            add(child.tail)
        return element

    return convert(tree)


def _local(source: Source, line: int, name: object) -> str:
    if not isinstance(name, str):
        raise source.error("only elements and text are allowed", line)
    if name.startswith(_XML):
        return f"xml:{name.removeprefix(_XML)}"
    if name.startswith("{"):
        local = name.rpartition("}")[2]
        raise source.error(f"{quoted(local)} is in a namespace; PML has none, remove xmlns", line)
    return name


def _lines(text: str) -> Iterator[int]:
    """Yield the lines of a well-formed document; libxml2 only knows where tags end.

    Before each tag, the line of the text there, 0 if that is white space alone; then the line of
    a start tag itself. An empty element counts as two tags.
    """
    line_of = _line_counter(text)
    at = text_line = 0
    for match in _MARKUP.finditer(text):
        for start, stop in ((at, match.start()), match.span("cdata")):
            found = None if text_line else _NOT_SPACE.search(text, start, stop)
            text_line = line_of(found.start()) if found else text_line
        at = match.end()
        if not match["tag"]:
            continue
        yield text_line
        text_line = 0
        if not match["close"]:
            yield line_of(match.start())
            if match["tag"].endswith("/>"):
                yield 0


def _line_counter(text: str) -> Callable[[int], int]:
    """Return the line of a position, for positions that only grow."""
    position, line = 0, 1

    def line_of(wanted: int) -> int:
        nonlocal position, line
        line += text.count("\n", position, wanted)
        position = wanted
        return line

    return line_of
