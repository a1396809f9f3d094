"""Templates that LlamaIndex's objects hold, found again in texts that were formatted out of sight.

Some engines format a template themselves and hand over the text alone. Which template it was shows
in the text: its literal parts stand there in their order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.core.output_parsers.pydantic import PYDANTIC_FORMAT_TMPL
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate
from llama_index.core.prompts.utils import SafeFormatter

from pcache_core import Segment
from pcache_integrations._mapping import ANCHOR_CHARS

# An output parser puts this behind a prompt.
_SCHEMA_HEAD, _, _SCHEMA_TAIL = ("\n\n" + PYDANTIC_FORMAT_TMPL).partition("{schema}")


@dataclass(frozen=True, slots=True)
class _Template:
    """literals: the text before each variable and, last, behind all. names: of the variables."""

    literals: tuple[str, ...]
    names: tuple[str, ...]

    def read(self, text: str) -> list[Segment] | None:
        """The text in segments, if it may be of this template."""
        first, *between, last = self.literals
        position, stop = len(first), len(text) - len(last)
        if stop < position or not (text.startswith(first) and text.endswith(last)):
            return None
        segments = [Segment(first, "literal")]
        for name, literal in zip(self.names, [*between, None], strict=True):
            at = stop if literal is None else text.find(literal, position, stop)
            if at < 0:
                return None
            segments.append(Segment(text[position:at], "argument", name))
            segments.append(Segment(literal if literal is not None else last, "literal"))
            position = at + len(literal or "")
        return [segment for segment in segments if segment.text]


class TemplateShelf:
    """Templates that were seen, the latest first; the oldest are forgotten. Not thread-safe."""

    def __init__(self, max_templates: int = 256) -> None:
        self._templates: OrderedDict[str, _Template | None] = OrderedDict()
        self._max_templates = max_templates

    def add(self, sources: Iterable[str]) -> None:
        """Remember templates in LlamaIndex's brace format; what is too short to be told is none."""
        for source in sources:
            if source not in self._templates:
                self._templates[source] = _parse(source)
            self._templates.move_to_end(source)
        while len(self._templates) > self._max_templates:
            self._templates.popitem(last=False)

    def read(self, text: str) -> list[Segment]:
        """The text as the template says that explains most of it; nothing if none does."""
        body, schema = _without_schema(text)
        readings = [
            template.read(body) for template in reversed(self._templates.values()) if template
        ]
        found: list[Segment] = max(filter(None, readings), key=_explained, default=[])
        return [*found, *schema] if found else []


def templates_of(held: Mapping[str, Any]) -> Iterator[str]:
    """The templates among an object's attributes, as LlamaIndex formats them."""
    for value in held.values():
        if isinstance(value, str):
            yield from (value for _ in range("{" in value))
        elif isinstance(value, BasePromptTemplate):
            yield from _sources(value)


def has_variables(message: ChatMessage) -> bool:
    """Whether a message of a template is filled with anything."""
    texts = [block.text for block in message.blocks if isinstance(block, TextBlock)]
    return any(SafeFormatter().parse(text) for text in texts)


def _sources(template: BasePromptTemplate) -> Iterator[str]:
    if isinstance(template, PromptTemplate):
        yield template.template
    elif isinstance(template, ChatPromptTemplate):
        yield from (message.content or "" for message in template.message_templates)
    elif isinstance(template, SelectorPromptTemplate):
        chosen = [choice for _, choice in template.conditionals or ()]
        for inner in (template.default_template, *chosen):
            yield from _sources(inner)


def _parse(source: str) -> _Template | None:
    names = SafeFormatter().parse(source)
    literals: list[str] = []
    rest = source
    for name in names:
        before, _, rest = rest.partition("{" + name + "}")
        literals.append(before)
    literals.append(rest)
    # Without text between variables, or with little at all, anything would fit.
    told = names and all(literals[1:-1]) and len("".join(literals).strip()) >= ANCHOR_CHARS
    return _Template(tuple(literals), tuple(names)) if told else None


def _without_schema(text: str) -> tuple[str, list[Segment]]:
    """The text before an output parser's demand, and the demand."""
    at = text.rfind(_SCHEMA_HEAD)
    if at < 0 or not text.endswith(_SCHEMA_TAIL):
        return text, []
    return text[:at], [Segment(text[at:], "literal")]


def _explained(segments: Sequence[Segment]) -> int:
    return sum(len(segment.text) for segment in segments if segment.kind == "literal")
