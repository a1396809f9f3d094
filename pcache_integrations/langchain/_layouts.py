"""Which parts of a rendered prompt are the template's own text, which its variables' values.

LangChain hands a template's serialised form and its input values to callbacks, and the rendered
prompt afterwards. Aligning the three gives a layout. A layout holds lengths, never text.

A `literal` span is always word for word a part of the template: only that may count as template
text, whatever a value holds. What can't be explained stays `text`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, Final, Literal, NamedTuple

from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue

from pcache_integrations._mapping import common_prefix_chars

# A value of one or two characters occurs in any text by accident.
_MIN_VALUE_CHARS = 3
# Mustache and Jinja2 tags. Anything but a plain variable may repeat or trim what is around it.
_TAG = re.compile(r"\{\{\{?.*?\}?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_VARIABLE = re.compile(r"\{\{\{?\s*(\w+(?:\.\w+)*)\s*\}?\}\}")


class Span(NamedTuple):
    """A stretch of `chars` characters. name: the variable of an argument."""

    kind: Literal["literal", "argument", "text"]
    name: str | None
    chars: int


Layout = tuple[Span, ...]


class _Piece(NamedTuple):
    """Template text and the field after it: a variable's name, none, or from here on unknown."""

    literal: str
    field: str | None


_UNKNOWN: Final = ""


def layouts(
    serialized: Mapping[str, Any], inputs: object, prompt: PromptValue
) -> Iterator[tuple[str, Layout]]:
    """The text blocks of a rendered prompt whose layout is known, with their layouts.

    serialized: the template as LangChain gives it to callbacks; inputs: what it was invoked with.
    """
    options = serialized.get("kwargs") or {}
    values = _values(options, inputs)
    if isinstance(prompt, ChatPromptValue):
        yield from _chat_layouts(options.get("messages") or (), values, prompt.messages)
    else:
        text = prompt.to_string()
        yield text, layout_of(_pieces(options), values, text)


def layout_of(pieces: Sequence[_Piece], values: Mapping[str, Any], text: str) -> Layout:
    """Align a template's pieces and its values with the text rendered from them."""
    spans: list[Span] = []
    position = 0
    for number, (literal, field) in enumerate(pieces):
        agreed = common_prefix_chars(literal, text[position : position + len(literal)])
        spans.append(Span("literal", None, agreed))
        position += agreed
        if field is None and agreed == len(literal):
            continue
        if field is None or field == _UNKNOWN or agreed < len(literal):
            break
        end = _value_end(values.get(field), pieces[number + 1 :], text, position)
        if end is None:
            break
        spans.append(Span("argument", field, end - position))
        position = end
    spans += _find_values(values, text[position:])
    return tuple(span for span in spans if span.chars)


def _value_end(value: object, after: Sequence[_Piece], text: str, start: int) -> int | None:
    """Where a variable's value ends: known for strings, else at the template's next text."""
    if isinstance(value, str) and text.startswith(value, start):
        return start + len(value)
    literal = next((piece.literal for piece in after if piece.literal), None)
    if literal is None:
        return len(text)
    end = text.find(literal, start)
    return end if end >= 0 else None


def _find_values(values: Mapping[str, Any], text: str) -> list[Span]:
    """Search string values in text whose template is unknown; the last place, longest first."""
    found: list[tuple[int, int, str]] = []
    strings = [(name, value) for name, value in values.items() if isinstance(value, str)]
    for name, value in sorted(strings, key=lambda item: -len(item[1])):
        start = text.rfind(value)
        end = start + len(value)
        free = all(end <= taken_start or taken_end <= start for taken_start, taken_end, _ in found)
        if len(value) >= _MIN_VALUE_CHARS and start >= 0 and free:
            found.append((start, end, name))
    spans: list[Span] = []
    position = 0
    for start, end, name in sorted(found):
        spans += [Span("text", None, start - position), Span("argument", name, end - start)]
        position = end
    return [*spans, Span("text", None, len(text) - position)]


def _values(options: Mapping[str, Any], inputs: object) -> dict[str, Any]:
    if not isinstance(inputs, Mapping):
        # A template with one variable may be invoked with the bare value.
        names: Sequence[str] = options.get("input_variables") or ()
        inputs = {names[0]: inputs} if len(names) == 1 else {}
    return {**(options.get("partial_variables") or {}), **inputs}


def _pieces(options: Mapping[str, Any]) -> list[_Piece]:
    """Cut a serialised string template at its fields; none if it has no template string."""
    template = options.get("template")
    if isinstance(template, dict):  # a content block: {"type": "text", "text": "... {variable}"}
        template = template.get("text")
    if not isinstance(template, str):
        return []
    if options.get("template_format", "f-string") == "f-string":
        return [
            # With its format, a field names no variable: the prompt does not hold the value as is.
            _Piece(literal, f"{field}:{spec}" if spec or conversion else field)
            for literal, field, spec, conversion in Formatter().parse(template)
        ]
    return list(_tagged_pieces(template))


def _tagged_pieces(template: str) -> Iterator[_Piece]:
    position = 0
    for tag in _TAG.finditer(template):
        variable = _VARIABLE.fullmatch(tag.group())
        yield _Piece(template[position : tag.start()], variable.group(1) if variable else _UNKNOWN)
        if not variable:
            return
        position = tag.end()
    yield _Piece(template[position:], None)


def _chat_layouts(
    templates: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    messages: Sequence[BaseMessage],
) -> Iterator[tuple[str, Layout]]:
    """Walk message templates and messages in step, as far as the step is known."""
    position = 0
    for template in _flatten(templates):
        options = template.get("kwargs") or {}
        if "variable_name" in options:  # MessagesPlaceholder
            count = len(values.get(options["variable_name"]) or ())
            position += min(count, options.get("n_messages") or count)
            continue
        if position >= len(messages) or not ("prompt" in options or "content" in options):
            return
        # A message object among the templates has content, but no telling who wrote it.
        if "prompt" in options:
            yield from _block_layouts(options["prompt"], values, messages[position])
        position += 1


def _block_layouts(
    prompts: Any, values: Mapping[str, Any], message: BaseMessage
) -> Iterator[tuple[str, Layout]]:
    blocks = [message.content] if isinstance(message.content, str) else message.content
    prompts = prompts if isinstance(prompts, list) else [prompts]
    for prompt, block in zip(prompts, blocks, strict=True):
        text = block.get("text") if isinstance(block, dict) else block
        if isinstance(text, str):
            yield text, layout_of(_pieces(prompt.get("kwargs") or {}), values, text)


def _flatten(templates: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for template in templates:
        nested = (template.get("kwargs") or {}).get("messages")
        if nested is None:
            yield template
        else:
            yield from _flatten(nested)
