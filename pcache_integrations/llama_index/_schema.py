"""LlamaIndex's prompt templates as schemas, and their prompts as segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from banks.env import env as banks_environment
from banks.extensions.chat import ChatExtension
from jinja2 import Environment
from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock
from llama_index.core.prompts import (
    BasePromptTemplate,
    ChatPromptTemplate,
    RichPromptTemplate,
)
from llama_index.core.prompts import PromptTemplate as LlamaTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate

from pcache_core.errors import TemplateError
from pcache_core.prompt import Segment
from pcache_integrations._segments import fitted
from pcache_integrations.llama_index._templates import has_variables
from pcache_templates import BraceTemplate, ChatTag, JinjaTemplate
from pcache_templates.base import Schematic
from pcache_templates.chat import ChatTemplate, TurnTemplate


def schema_for(
    template: BasePromptTemplate,
    *,
    llm: Any = None,
    name: str | None = None,
    lengths: Mapping[str, int] | None = None,
) -> str:
    """The PML schema of a prompt template.

    llm: which decides between the templates of a `SelectorPromptTemplate`. name: of the schema;
        made of the content when not given. lengths: the most tokens of each variable; 64 if not
        given.
    Raises: TemplateError: no schema can express the template.
    """
    return _compile(_selected(template, llm), name, lengths).pml


def segments_for(
    template: BasePromptTemplate, values: Mapping[str, Any], *, llm: Any = None
) -> list[list[Segment]]:
    """The texts of the prompt that the template renders, each in segments.

    A `PromptTemplate` has one text, as a `RichPromptTemplate` without chat tags; others have one or
    more in each message. Joined, the segments of each are what LlamaIndex makes of it; where that
    can't be traced, they are a single `text`. Rendering uses up iterators among the values.
    """
    template = _selected(template, llm)
    texts = _texts(template, values)
    try:
        mapped = template._map_all_vars({**template.kwargs, **values})
        candidates = list(_candidates(template, mapped))
    except Exception:  # whatever stops the tracing costs reuse, no more
        candidates = []
    return fitted(candidates, texts)


def _selected(template: BasePromptTemplate, llm: Any) -> BasePromptTemplate:
    if isinstance(template, SelectorPromptTemplate):
        return template.select(llm=llm)
    return template


def _texts(template: BasePromptTemplate, values: Mapping[str, Any]) -> list[str]:
    """What LlamaIndex renders: the text of every block."""
    if _is_chat(template):
        messages = template.format_messages(**values)
        return [text for message in messages for text in _message_texts(message)]
    return [template.format(**values)]


def _is_chat(template: BasePromptTemplate) -> bool:
    if isinstance(template, RichPromptTemplate):
        return template.is_chat_template
    return isinstance(template, ChatPromptTemplate)


def _message_texts(message: ChatMessage) -> Iterator[str]:
    return (block.text for block in message.blocks if isinstance(block, TextBlock))


def _candidates(
    template: BasePromptTemplate, values: Mapping[str, Any]
) -> Iterator[Sequence[Segment]]:
    if isinstance(template, ChatPromptTemplate):
        chat = _chat_template(template, None, None)
        for number, message in enumerate(template.message_templates):
            for position, text in enumerate(_message_texts(message)):
                if _may_be_history(message):
                    yield [Segment(text, "argument", message.role.value)] if text else []
                else:
                    yield chat.segments(number, position, values)
        return
    compiled = _compiled_rich if isinstance(template, RichPromptTemplate) else _compiled_plain
    source = compiled(template.get_template())
    # A tag that no schema expresses may do anything, such as call a model: it runs once only.
    source.schema  # noqa: B018
    if isinstance(source, JinjaTemplate) and _is_chat(template):
        yield from (turn.segments for turn in source.render_chat(**values))
    else:
        yield source.segments(**values)


def _may_be_history(message: ChatMessage) -> bool:
    """Chat engines put what was said before into a template made for one call."""
    return message.role is not MessageRole.SYSTEM and not has_variables(message)


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
        texts = [BraceTemplate(text) for text in _message_texts(message)]
        turns.append(TurnTemplate(message.role.value, texts))
    return ChatTemplate(turns, name=name, lengths=lengths)


@lru_cache(maxsize=256)
def _compiled_rich(source: str) -> JinjaTemplate:
    return JinjaTemplate(source, environment=_environment())


@lru_cache(maxsize=256)
def _compiled_plain(source: str) -> BraceTemplate:
    return BraceTemplate(source)


@cache
def _environment() -> Environment:
    """The environment of `RichPromptTemplate`, with a chat tag that keeps what is in it as text."""
    environment: Environment = banks_environment.overlay()
    del environment.extensions[ChatExtension.identifier]
    environment.add_extension(ChatTag)
    return environment
