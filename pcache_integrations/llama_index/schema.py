"""LlamaIndex's prompt templates as schemas, and its Jinja templates' prompts in segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

from banks.env import env as banks_environment
from banks.extensions.chat import ChatExtension
from jinja2 import Environment
from llama_index.core.base.llms.types import TextBlock
from llama_index.core.prompts import (
    BasePromptTemplate,
    ChatPromptTemplate,
    RichPromptTemplate,
)
from llama_index.core.prompts import PromptTemplate as LlamaTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate

from pcache_core.errors import TemplateError
from pcache_core.prompt import Segment
from pcache_templates import BraceTemplate, ChatTag, JinjaTemplate
from pcache_templates.base import ChatTemplate, Schematic, TurnTemplate


def schema_for(
    template: BasePromptTemplate,
    *,
    llm: Any = None,
    name: str | None = None,
    lengths: Mapping[str, int] | None = None,
) -> str:
    """Return the PML schema of a prompt template.

    llm: which decides between the templates of a `SelectorPromptTemplate`. name: of the schema;
        made of the content when not given. lengths: the most tokens of each variable; 64 if not
        given.
    Raises: TemplateError: no schema can express the template.
    """
    return _compile(selected(template, llm), name, lengths).pml


def render_rich(
    template: RichPromptTemplate, values: Mapping[str, Any]
) -> list[tuple[str | None, list[Segment]]]:
    """Render a Jinja template in segments: `argument` for what values make, else `literal`.

    Returns: each message's role and segments; one without a role if the template has no messages.
    Raises: TemplateError: the template fails, or does what no schema can express, such as a tag
        that calls a model, which must not run twice.
    """
    source = _compiled(template.template_str)
    source.schema  # noqa: B018 (raises)
    turns: Sequence[tuple[str | None, Sequence[Segment]]]
    if template.is_chat_template:
        turns = source.render_chat(**values)
    else:
        turns = [(None, source.segments(**values))]
    return [(role, [_plain(part) for part in segments if part.text]) for role, segments in turns]


def _plain(segment: Segment) -> Segment:
    """Return a segment as any template's: the compiler calls what a loop writes a document."""
    if segment.kind == "literal":
        return replace(segment, name=None)
    return replace(segment, kind="argument")


def selected(template: BasePromptTemplate, llm: Any) -> BasePromptTemplate:
    """Return the template that a `SelectorPromptTemplate` chooses; any other as it is."""
    if isinstance(template, SelectorPromptTemplate):
        return template.select(llm=llm)
    return template


def _compile(
    template: BasePromptTemplate, name: str | None, lengths: Mapping[str, int] | None
) -> Schematic:
    if isinstance(template, RichPromptTemplate):
        source = template.template_str
        return JinjaTemplate(source, environment=_environment(), name=name, lengths=lengths)
    if isinstance(template, LlamaTemplate):
        return BraceTemplate(template.template, name=name, lengths=lengths)
    if isinstance(template, ChatPromptTemplate):
        return _chat_template(template, name, lengths)
    raise TemplateError(
        f"{type(template).__name__} has no schema; "
        "a PromptTemplate, ChatPromptTemplate or RichPromptTemplate has"
    )


def _chat_template(
    template: ChatPromptTemplate, name: str | None, lengths: Mapping[str, int] | None
) -> ChatTemplate:
    turns = []
    for message in template.message_templates:
        if message.role.value not in ("system", "user", "assistant"):
            raise TemplateError(
                f"a message with the role {message.role.value!r} has no schema; "
                "a schema knows system, user and assistant turns"
            )
        blocks = [block for block in message.blocks if isinstance(block, TextBlock)]
        texts = [BraceTemplate(block.text) for block in blocks]
        turns.append(TurnTemplate(message.role.value, texts))
    return ChatTemplate(turns, name=name, lengths=lengths)


@lru_cache(maxsize=256)
def _compiled(source: str) -> JinjaTemplate:
    return JinjaTemplate(source, environment=_environment())


@cache
def _environment() -> Environment:
    """Return `RichPromptTemplate`'s environment; its chat tag keeps what is in it as text."""
    environment: Environment = banks_environment.overlay()
    del environment.extensions[ChatExtension.identifier]
    environment.add_extension(ChatTag)
    return environment
