"""Prompts written as PML: uses of a schema's modules, with arguments and documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from pcache_core.errors import TemplateError
from pcache_templates.pml import xml_attribute, xml_text
from pcache_templates.schema import Module, Node, Param, Place, Schema, Slot, Text, children_of
from pcache_templates.trace import SpanKind, Traced, place_of


class _Part(NamedTuple):
    """A stretch of the prompt. owner: the module or slot that it belongs to."""

    owner: str
    place: Place
    kind: SpanKind
    text: str


def to_prompt_pml(schema: Schema, traced: Traced) -> str:
    """Write a rendered prompt as one that uses `schema`.

    Raises: TemplateError: the prompt is none of the schema's, for example as a part of it could not
        be traced, or it holds a character that XML can't.
    """
    ways = dict(_ways(schema.children, ()))
    opened: tuple[str, ...] = ()
    used: set[str] = set()
    written = [f'<prompt schema={xml_attribute(schema.name)} xml:space="preserve">']
    for owner, group in groupby(_parts(schema, traced), key=lambda part: part.owner):
        around, node = ways[owner]
        shared = _num_shared(opened, around)
        written += [f"</{name}>" for name in reversed(opened[shared:])]
        written += [f"<{name}>" for name in around[shared:]]
        fresh = {*around[shared:], owner}
        if fresh & used:
            raise TemplateError(
                f"the prompt has module {sorted(fresh & used)[0]!r} twice; a prompt uses it once"
            )
        used |= fresh
        opened = around
        parts = list(group)
        written.append(_fill(node, parts) if isinstance(node, Slot) else _use(node, parts))
    written += [f"</{name}>" for name in reversed(opened)]
    return "".join([*written, "</prompt>\n"])


def _ways(
    nodes: Iterable[Node], around: tuple[str, ...]
) -> Iterator[tuple[str, tuple[tuple[str, ...], Module | Slot]]]:
    """Every module and slot by name, with the names of the modules around it."""
    for node in nodes:
        inside = around
        if isinstance(node, Module | Slot):
            yield node.name, (around, node)
            inside = (*around, node.name)
        yield from _ways(children_of(node), inside)


def _num_shared(left: tuple[str, ...], right: tuple[str, ...]) -> int:
    shared = 0
    while shared < min(len(left), len(right)) and left[shared] == right[shared]:
        shared += 1
    return shared


def _parts(schema: Schema, traced: Traced) -> Iterator[_Part]:
    text = str(traced)
    position = 0
    for span in traced.spans:
        part = text[position : position + span.chars]
        position += span.chars
        place = place_of(span.path, schema.places)
        if place is not None:
            kind: SpanKind = place.kind if span.kind == "argument" else span.kind
            yield _Part(place.slot or place.module, place, kind, part)
        elif part:
            raise TemplateError(f"{part[:40]!r} has no place in schema {schema.name!r}")


def _use(module: Module, parts: list[_Part]) -> str:
    """A module whose parameters take what was written in their places."""
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
    attributes = "".join(f" {name}={xml_attribute(text)}" for name, text in arguments.items())
    return f"<{module.name}{attributes}/>"


def _fill(slot: Slot, parts: list[_Part]) -> str:
    """A slot with documents, and what was written around them."""
    inside = "".join(
        f"<document>{xml_text(part.text)}</document>"
        if part.kind == "document" and part.text
        else xml_text(part.text)
        for part in parts
    )
    return f"<{slot.name}>{inside}</{slot.name}>"
