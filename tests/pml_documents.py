"""Random schemas and prompts for PML, as trees and as text, right and wrong."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from random import Random

from hypothesis import strategies as st

from pcache_core.pml import (
    Document,
    Module,
    ModuleUse,
    Param,
    PromptTree,
    Role,
    Scaffold,
    Schema,
    Slot,
    Text,
    Turn,
    Union,
)

_WORDS = st.sampled_from(
    [
        "tea",
        " for two",
        "\n  ",
        " ",
        "<b>",
        "a&b",
        "]]>",
        "</module>",
        "<|im_end|>",
        "ß 漢",
        "\t'\"",
    ]
)
_TEXTS = st.lists(_WORDS, min_size=1, max_size=4).map("".join)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """A schema that keeps every rule."""
    return Schema("s", _children(draw, depth=0, in_role=False))


def _children(draw: st.DrawFn, *, depth: int, in_role: bool) -> tuple[object, ...]:
    """What a schema or module holds; names are unique because they are counted."""
    count = iter(range(100))
    return tuple(_merged(_nodes(draw, count, depth, in_role=in_role)))


def _nodes(draw: st.DrawFn, count: object, depth: int, *, in_role: bool) -> list[object]:
    kinds = ["text", "param", "slot", "scaffold"]
    if depth < 3:
        kinds += ["module", "module", "union"] + ([] if in_role else ["role"])
    nodes: list[object] = []
    siblings: list[str] = []
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=5)):
        name = f"n{next(count)}"  # type: ignore[call-overload]
        if kind == "text":
            nodes.append(Text(draw(_TEXTS)))
        elif kind == "param":
            nodes.append(Param(name, draw(st.integers(1, 9)), draw(st.sampled_from([None, "x"]))))
        elif kind == "slot":
            nodes.append(Slot(name, draw(st.integers(1, 40))))
        elif kind == "module":
            siblings.append(name)
            nodes.append(_module(draw, name, depth, in_role=in_role))
        elif kind == "union":
            names = [f"{name}.{index}" for index in range(draw(st.integers(1, 3)))]
            members = tuple(_module(draw, member, depth, in_role=in_role) for member in names)
            nodes.append(Union(members, draw(st.sampled_from([None, *names]))))
        elif kind == "role":
            role = draw(st.sampled_from(["system", "user", "assistant"]))
            inside = tuple(_merged(_nodes(draw, count, depth + 1, in_role=True)))
            nodes.append(Role(role, inside))
        elif len(siblings) > 1:
            nodes.append(Scaffold(tuple(siblings[:2])))
    return nodes


def _module(draw: st.DrawFn, name: str, depth: int, *, in_role: bool) -> Module:
    children = _children(draw, depth=depth + 1, in_role=in_role)
    return Module(name, children, draw(st.booleans()))  # type: ignore[arg-type]


def _merged(nodes: list[object]) -> list[object]:
    """Texts side by side are one text in XML; white space alone beside a message is none."""
    merged: list[object] = []
    for node in nodes:
        if isinstance(node, Text) and merged and isinstance(merged[-1], Text):
            merged[-1] = Text(merged[-1].text + node.text)
        else:
            merged.append(node)
    return [
        Text(f"{node.text}.") if isinstance(node, Text) and not node.text.strip() else node
        for node in merged
    ]


@st.composite
def prompts(draw: st.DrawFn, schema: Schema) -> PromptTree:
    """A prompt that fits a schema: arguments of one word, documents that fit, no messages."""
    arguments, uses = _used(draw, schema.children)
    texts = [Text(f" {word} ") for word in draw(st.lists(st.sampled_from("QRS"), max_size=2))]
    return PromptTree("s", (*uses, *texts[:1]), arguments)


def _used(
    draw: st.DrawFn, children: tuple[object, ...]
) -> tuple[dict[str, str], tuple[ModuleUse, ...]]:
    arguments: dict[str, str] = {}
    uses: list[ModuleUse] = []
    for node in _flat(children):
        if isinstance(node, Param):
            arguments[node.name] = draw(st.sampled_from(["", "Oslo"]))
        elif isinstance(node, Slot) and draw(st.booleans()):
            uses.append(ModuleUse(node.name, {}, (Document("doc", "d"),)))
        elif isinstance(node, Module) and draw(st.booleans()):
            uses.append(_use(draw, node))
        elif isinstance(node, Union) and draw(st.booleans()):
            uses.append(_use(draw, draw(st.sampled_from(node.members))))
    return arguments, tuple(draw(st.permutations(uses)))


def _use(draw: st.DrawFn, module: Module) -> ModuleUse:
    arguments, uses = _used(draw, module.children)
    return ModuleUse(module.name, arguments, uses)


def _flat(children: tuple[object, ...]) -> list[object]:
    found: list[object] = []
    for node in children:
        found += _flat(node.children) if isinstance(node, Role) else [node]
    return found


def to_xml(node: object) -> str:
    """A tree as PML in which all white space counts."""
    tag, attributes, inside = _parts(node)
    if tag is None:
        return inside
    space = ' xml:space="preserve"' if isinstance(node, Schema | PromptTree) else ""
    return f"<{tag}{space}{_attributes(attributes)}>{inside}</{tag}>"


def _parts(node: object) -> tuple[str | None, dict[str, str | None], str]:
    """Tag, attributes and content of a node; those that are None are not written."""
    match node:
        case Text(text):
            return None, {}, escape(text, quote=False)
        case Param(name, length, scaffold):
            return "param", {"name": name, "len": str(length), "scaffold": scaffold}, ""
        case Slot(name, max_tokens):
            return "slot", {"name": name, "max-tokens": str(max_tokens)}, ""
        case Scaffold(modules):
            return "scaffold", {"modules": " ".join(modules)}, ""
        case Module(name, children, cache):
            return "module", {"name": name, "cache": str(cache).lower()}, _all(children)
        case Union(members, scaffold):
            return "union", {"scaffold": scaffold}, _all(members)
        case Document(text, name):
            return "document", {"name": name}, escape(text, quote=False)
    return _outer_parts(node)


def _outer_parts(node: object) -> tuple[str | None, dict[str, str | None], str]:
    match node:
        case Role(role, children) | Turn(role, children):
            return role, {}, _all(children)
        case Schema(name, children):
            return "schema", {"name": name}, _all(children)
        case ModuleUse(name, arguments, children):
            return name, dict(arguments), _all(children)
        case PromptTree(schema, children, arguments):
            return "prompt", {"schema": schema, **arguments}, _all(children)
    raise AssertionError(node)


def _all(children: tuple[object, ...]) -> str:
    return "".join(to_xml(child) for child in children)


def _attributes(attributes: dict[str, str | None]) -> str:
    return "".join(
        f" {name}={_quoted(value)}" for name, value in attributes.items() if value is not None
    )


def _quoted(value: str) -> str:
    text = escape(value).replace("\n", "&#10;").replace("\t", "&#9;")
    return f'"{text}"'


_TAGS = [
    *("schema", "prompt", "module", "union", "param", "parameter", "slot", "scaffold"),
    *("system", "user", "assistant", "document", "a", "b", "docs", "x:y", "1", ""),
]
_NAMES = ["name", "schema", "len", "length", "cache", "src", "scaffold", "modules", "max-tokens"]
_NAMES += ["xml:space", "xmlns", "xmlns:x", "x:name", "a", "0"]
_VALUES = ["a", "b", "a b", "1", "0", "-1", "true", "preserve", "", "&", "&amp;", "<", "../x"]
_VALUES += ["9" * 20, "é", "a\nb"]
_BITS = [
    *("<!--c-->", "<!--", "-->", "<![CDATA[<b>]]>", "<![CDATA[", "]]>", "<?pi x?>", "<?", "&lt;"),
    *("&#0;", "&#x41;", "&#xD800;", "&foo;", "&", "<", ">", "\0", "\ufeff", "\ufffe", "\r", "text"),
    *("<!DOCTYPE a [<!ENTITY b 'c'>]>", "<xi:include href='/etc/passwd'/>", "\x1b", "  \n  ", "🦜"),
    *("<a/>", "<b c='d'/>", "<docs><document>d</document></docs>", "<user>u</user>", "'", '"', "="),
    *("<module name='a'>m</module>", "<slot name='docs'/>", "<param name='c' len='2'/>", "\ud800"),
]


def random_document(random: Random, files: Sequence[bytes]) -> str | bytes:
    """A document that may be PML, nearly so, or bytes: made of PML's parts, or a file changed."""
    match random.randrange(8):
        case 0:
            return random.randbytes(random.randrange(60))
        case 1:
            return "".join(_random_element(random, 0) for _ in range(random.randrange(4)))
        case 2 | 3:
            root, name = random.choice([("schema", "name"), ("prompt", "schema")])
            inside = "".join(_random_element(random, 0) for _ in range(random.randrange(5)))
            return f"<{root} {name}='a'>{inside}</{root}>"
    return _changed(random, random.choice(files))


def _random_element(random: Random, depth: int) -> str:
    if depth > 3 or random.random() < 0.4:
        return random.choice(_BITS)
    tag = random.choice(_TAGS)
    quote = random.choice("\"'")
    attributes = "".join(
        f" {random.choice(_NAMES)}={quote}{random.choice(_VALUES)}{quote}"
        for _ in range(random.randrange(3))
    )
    inside = "".join(_random_element(random, depth + 1) for _ in range(random.randrange(4)))
    end = tag if random.random() < 0.95 else random.choice(_TAGS)
    return f"<{tag}{attributes}>{inside}</{end}>"


def _changed(random: Random, file: bytes) -> bytes:
    """A file with up to three spans cut, doubled, replaced by bits or by bytes."""
    data = bytearray(file)
    for _ in range(random.randrange(4)):
        start = random.randrange(len(data) + 1)
        stop = min(len(data), start + random.choice([0, 1, 3, 40]))
        span = bytes(data[start:stop])
        bit = random.choice(_BITS).encode(errors="surrogatepass")
        data[start:stop] = random.choice([b"", span * 2, bit, bit, random.randbytes(2)])
    return bytes(data)
