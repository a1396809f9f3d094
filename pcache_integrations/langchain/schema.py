"""LangChain's prompt templates as schemas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2.sandbox import SandboxedEnvironment
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.prompts import (
    AIMessagePromptTemplate,
    BasePromptTemplate,
    ChatMessagePromptTemplate,
    ChatPromptTemplate,
    HumanMessagePromptTemplate,
    MessagesPlaceholder,
    SystemMessagePromptTemplate,
)
from langchain_core.prompts import PromptTemplate as LangChainTemplate
from langchain_core.utils import mustache

from pcache_core.errors import TemplateError
from pcache_integrations.langchain.watch import message_texts
from pcache_templates import FormatTemplate, JinjaTemplate, MustacheTemplate, PromptTemplate
from pcache_templates.base import ChatTemplate, GivenTurns, TurnTemplate

_ROLES: dict[Any, str] = {
    SystemMessagePromptTemplate: "system",
    SystemMessage: "system",
    HumanMessagePromptTemplate: "user",
    HumanMessage: "user",
    AIMessagePromptTemplate: "assistant",
    AIMessage: "assistant",
}


def schema_for(
    template: BasePromptTemplate[Any],
    *,
    name: str | None = None,
    lengths: Mapping[str, int] | None = None,
) -> str:
    """Return the PML schema of a prompt template.

    name: of the schema; made of the content when not given. lengths: the most tokens of each
        variable; 64 if not given.
    Raises: TemplateError: no schema can express the template.
    """
    if isinstance(template, ChatPromptTemplate):
        return ChatTemplate(_turns(template), name=name, lengths=lengths).pml
    return _string_template(template, name, lengths).pml


def _parts(template: ChatPromptTemplate) -> Iterator[Any]:
    """Yield the parts of a chat template, and of those that it holds."""
    for part in template.messages:
        if isinstance(part, ChatPromptTemplate):
            yield from _parts(part)
        else:
            yield part


def _turns(template: ChatPromptTemplate) -> Iterator[TurnTemplate | GivenTurns]:
    for part in _parts(template):
        if isinstance(part, MessagesPlaceholder):
            yield GivenTurns(part.variable_name)
            continue
        role = _role_of(part)
        if isinstance(part, BaseMessage):
            yield TurnTemplate(role, [_constant(text) for text in message_texts([part])])
        else:
            yield TurnTemplate(role, [_string_template(p, None, None) for p in _prompts(part)])


def _role_of(part: Any) -> str:
    role = _ROLES.get(type(part))
    if isinstance(part, ChatMessagePromptTemplate):
        role = {"human": "user", "ai": "assistant"}.get(part.role, part.role)
    if role not in ("system", "user", "assistant"):
        raise TemplateError(
            f"{type(part).__name__} has no schema; a schema knows system, user and assistant turns"
        )
    return role


def _prompts(part: Any) -> Sequence[Any]:
    return part.prompt if isinstance(part.prompt, list) else [part.prompt]


def _constant(text: str) -> PromptTemplate:
    return FormatTemplate(text.replace("{", "{{").replace("}", "}}"))


def _string_template(
    template: Any, name: str | None, lengths: Mapping[str, int] | None
) -> PromptTemplate:
    if type(template) is not LangChainTemplate:
        raise TemplateError(
            f"{type(template).__name__} has no schema; "
            "a PromptTemplate or a ChatPromptTemplate of text has"
        )
    source, template_format = template.template, template.template_format
    if template_format == "jinja2":
        # As `langchain_core.prompts.string.jinja2_formatter` has it.
        environment = SandboxedEnvironment()
        return JinjaTemplate(source, environment=environment, name=name, lengths=lengths)
    if template_format == "mustache":
        return MustacheTemplate(mustache.tokenize(source), name=name, lengths=lengths)
    return FormatTemplate(source, name=name, lengths=lengths)
