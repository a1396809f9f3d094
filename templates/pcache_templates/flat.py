"""Templates without branches: Python's format strings, and LlamaIndex's simpler ones."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from string import Formatter
from typing import NamedTuple

from pcache_core.errors import TemplateError
from pcache_templates import trace
from pcache_templates.base import PromptTemplate
from pcache_templates.trace import Traced
from pcache_templates.tree import Node, Path, xml_name


class _Field(NamedTuple):
    """A place for a value. source: the field as it stands in the template."""

    name: str
    source: str
    spec: str = ""


class _FlatTemplate(PromptTemplate):
    """Text and fields, one after the other."""

    def __init__(
        self,
        source: str,
        *,
        name: str | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(name, lengths)
        self._parts = tuple(self._parse(source))

    @abstractmethod
    def _parse(self, source: str) -> Iterator[str | _Field]: ...

    @abstractmethod
    def _fill(self, field: _Field, values: Mapping[str, object]) -> str | None:
        """Return what the field is replaced by; None if it stays as it is written."""

    def trace(self, values: Mapping[str, object]) -> Traced:
        """Render. Raises: TemplateError: a value is missing or can't be written."""
        return trace.concat(self._written(values))

    def _written(self, values: Mapping[str, object]) -> Iterator[Traced]:
        for number, part in enumerate(self._parts):
            if isinstance(part, str):
                yield trace.literal((number,), part)
            elif (text := self._fill(part, values)) is None:
                yield trace.literal((number,), part.source)
            else:
                yield trace.value((number,), text)

    def raw_nodes(self) -> Iterator[Node]:
        """As the base class."""
        for number, part in enumerate(self._parts):
            if isinstance(part, str):
                yield Node("text", part, origin=(number,))
            else:
                yield self._field(part, (number,))

    def _field(self, field: _Field, origin: Path) -> Node:
        return Node("param", xml_name(field.name), origin=origin)


class FormatTemplate(_FlatTemplate):
    r"""A format string, as `str.format` and LangChain's f-string templates know them.

    ```python
    FormatTemplate("From:\n{context}\n\nQ: {question}").render(context="…", question="Who?")
    ```

    Raises: TemplateError: a brace is left open, or what stands in braces can't be a field's name.
    """

    _NAME = re.compile(r"(?!\d+$)\w(?:[\w -]*\w)?(?:\.\w+|\[[^\[\]]+\])*")
    # Of Python's own types; of dates, `%` and letters.
    _SPEC = re.compile(
        r"(?:.?[<>=^])?[-+ ]?z?#?0?\d*[,_]?(?:\.\d+)?[,_]?[bcdeEfFgGnosxX%]?|.*[%{].*", re.DOTALL
    )

    def _parse(self, source: str) -> Iterator[str | _Field]:
        try:
            parsed = list(Formatter().parse(source))
        except ValueError as error:
            raise TemplateError(
                f"the format string {source[:40]!r} can't be read: {error}; "
                "write {{ and }} for braces"
            ) from error
        for literal, name, spec, conversion in parsed:
            if literal:
                yield literal
            if name is None:
                continue
            if not name or name.isdigit():
                raise TemplateError(
                    f"the format string {source[:40]!r} has a field without a name; name it"
                )
            converted = f"!{conversion}" if conversion else ""
            field = _Field(name, f"{{{name}{converted}{':' if spec else ''}{spec}}}", spec or "")
            if not self._NAME.fullmatch(name):
                raise self._no_field(field)
            yield field

    def _no_field(self, field: _Field) -> TemplateError:
        return TemplateError(
            f"{field.source[:40]!r} in the format string is not a field; "
            "write {{ and }} for braces that are text"
        )

    def _field(self, field: _Field, origin: Path) -> Node:
        if not self._SPEC.fullmatch(field.spec):
            raise self._no_field(field)  # a type of one's own may know it, so it is rendered
        return super()._field(field, origin)

    def _fill(self, field: _Field, values: Mapping[str, object]) -> str:
        try:
            return Formatter().vformat(field.source, (), values)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise TemplateError(
                f"the field {field.source} can't be filled: {type(error).__name__}: {error}; "
                "write {{ and }} for braces that are text"
            ) from error


class BraceTemplate(_FlatTemplate):
    """A template in which `{name}` is replaced if there is such a value; braces mean nothing else.

    As LlamaIndex's `PromptTemplate` fills it: `{{name}}` becomes the value between two braces, and
    JSON stays as it is.
    """

    _FIELD = re.compile(r"\{([^{}]+)\}")
    _NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*(?:\.[a-zA-Z_][a-zA-Z0-9_]*)*")

    def _parse(self, source: str) -> Iterator[str | _Field]:
        position = 0
        for found in self._FIELD.finditer(source):
            if found.start() > position:
                yield source[position : found.start()]
            yield _Field(found.group(1), found.group())
            position = found.end()
        if position < len(source):
            yield source[position:]

    def _fill(self, field: _Field, values: Mapping[str, object]) -> str | None:
        return str(values[field.name]) if field.name in values else None

    def _field(self, field: _Field, origin: Path) -> Node:
        if self._NAME.fullmatch(field.name):
            return super()._field(field, origin)
        return Node("text", field.source, origin=origin)
