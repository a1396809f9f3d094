"""Mustache templates, rendered as LangChain renders them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pcache_core.errors import TemplateError
from pcache_templates import trace
from pcache_templates.base import PromptTemplate
from pcache_templates.trace import Traced
from pcache_templates.tree import Node, Path, xml_name

Token = tuple[str, str]  # type and key, as `langchain_core.utils.mustache.tokenize` gives them


class _Tag(NamedTuple):
    """A literal, a variable or a section with what is in it."""

    type: str
    key: str
    path: Path
    body: tuple[_Tag, ...] = ()


class _Context(NamedTuple):
    """What names are looked up in. is_item: one of the things that a section goes through."""

    value: Any
    is_item: bool


class MustacheTemplate(PromptTemplate):
    """A Mustache template, cut into tokens.

    A section becomes a slot, as only its value decides whether it is written once, never or often;
    an inverted one becomes a module. Partials are empty, as in LangChain.

    ```python
    MustacheTemplate(langchain_core.utils.mustache.tokenize("Hello {{name}}")).render(name="Ann")
    ```

    Raises: TemplateError: the tokens can't be read.
    """

    def __init__(
        self,
        tokens: Iterable[Token],
        *,
        name: str | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(name, lengths)
        try:
            self._tags = _nest(enumerate(tokens))
        except SyntaxError as error:
            raise TemplateError(f"the mustache template can't be read: {error}") from error

    def trace(self, values: Mapping[str, object]) -> Traced:
        """Render. Raises: TemplateError: a section's value is a function."""
        return trace.concat(_write(self._tags, [_Context(values, is_item=False)]))

    def raw_nodes(self) -> Iterator[Node]:
        """As the base class."""
        return map(_part, self._tags)


def _nest(tokens: Iterator[tuple[int, Token]]) -> tuple[_Tag, ...]:
    """Tags up to the end of the section that they are in."""
    tags: list[_Tag] = []
    for number, (type_, key) in tokens:
        if type_ == "end":
            break
        body = _nest(tokens) if type_ in ("section", "inverted section") else ()
        tags.append(_Tag(type_, key, (number,), body))
    return tuple(tags)


def _part(tag: _Tag) -> Node:
    body = tuple(map(_part, tag.body))
    match tag.type:
        case "variable" | "no escape":
            name = "item" if tag.key == "." else xml_name(tag.key)
            return Node("param", name, origin=tag.path)
        case "section":
            return Node("slot", xml_name(["for", tag.key]), body, tag.path)
        case "inverted section":
            return Node("module", xml_name(["if-not", tag.key]), body)
        case _:
            return Node("text", tag.key if tag.type == "literal" else "", origin=tag.path)


def _write(tags: Iterable[_Tag], contexts: Sequence[_Context]) -> Iterator[Traced]:
    """contexts: the innermost first."""
    if not contexts[0].value and len(contexts) > 1:
        return
    for tag in tags:
        match tag.type:
            case "literal":
                yield trace.literal(tag.path, tag.key)
            case "variable" | "no escape":
                found = _look_up(tag.key, contexts)
                kind: trace.SpanKind = "document" if found.is_item else "argument"
                text = _text_of(found.value, tag, contexts)
                yield trace.value(tag.path, text, kind)
            case "section":
                for context in _section_contexts(_look_up(tag.key, contexts), tag.key):
                    yield from _write(tag.body, [context, *contexts])
            case "inverted section":
                is_missing = not _look_up(tag.key, contexts).value
                yield from _write(tag.body, [_Context(is_missing, is_item=False), *contexts])


def _section_contexts(found: _Context, key: str) -> Iterator[_Context]:
    """Yield what the names in a section are looked up in, once for each time it is written."""
    value = found.value
    if callable(value):
        raise TemplateError(
            f"the value of section {key!r} is a function; such a section can't be traced"
        )
    if isinstance(value, Sequence | Iterator) and not isinstance(value, str):
        for item in value:
            yield _Context(item, is_item=True)
    else:
        yield found


def _text_of(value: Any, tag: _Tag, contexts: Sequence[_Context]) -> str:
    if tag.type == "no escape":
        return str(value)
    if value is True and tag.key == ".":
        value = contexts[1].value  # the one that an inverted section made a truth value of
    text = str(value).replace("&", "&amp;")
    return text.replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def _look_up(key: str, contexts: Sequence[_Context]) -> _Context:
    """Return the value of a dotted key in the innermost context that has it; empty if none has."""
    if key == ".":
        return contexts[0]
    for context in contexts:
        try:
            value = _follow(key, context.value)
        except (LookupError, ValueError, TypeError):
            continue
        if value in (0, False):
            return _Context(value, context.is_item)
        return _Context(value or "", context.is_item)
    return _Context("", is_item=False)


def _follow(key: str, value: Any) -> Any:
    for part in key.split("."):
        if value in (0, False):
            return value
        if isinstance(value, Mapping):
            value = value[part]
        elif isinstance(value, list | tuple):
            value = value[int(part)]
        else:
            raise TypeError(f"no names in {type(value).__name__}")
    return value
