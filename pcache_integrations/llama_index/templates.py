"""Segments of what LlamaIndex hands over: documents by content, template text where it is told.

`predict`, `stream` and their kin are handed a template and its values, and make the prompt's text
of them within the call. What they are told is held against that text alone: it counts if it joins
to exactly the text that reaches the model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as joined_with_roles
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.llms.llm import LLM
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.output_parsers.pydantic import PYDANTIC_FORMAT_TMPL
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, RichPromptTemplate
from llama_index.core.prompts import PromptTemplate as LlamaTemplate
from llama_index.core.types import BaseOutputParser

from pcache_core import Message, Segment
from pcache_core.chat.messages import render_chat
from pcache_core.prompt import SegmentKind
from pcache_integrations.llama_index.schema import render_rich, selected
from pcache_integrations.llama_index.watch import DOCUMENTS

Told = Mapping[str, Sequence[Segment]]  # texts for the model, in the segments that join to them

# What is said in these roles is whoever built the application's, and the same for every question.
TEMPLATE_ROLES = (MessageRole.SYSTEM, MessageRole.DEVELOPER)

_NO_ROLE = "text"  # of the one text of a template that has no messages
_FIELD = re.compile(r"\{([^{}]+)\}")  # as LlamaIndex fills it
_told: ContextVar[Told] = ContextVar("told", default=MappingProxyType({}))


def segments_of(text: str, kind: SegmentKind) -> list[Segment]:
    """Cut a text that the model is handed. kind: of what nothing is told of."""
    return DOCUMENTS.cut(_told.get().get(text) or _untold(text, kind))


def _untold(text: str, kind: SegmentKind) -> list[Segment]:
    """Cut out what LlamaIndex's parser says of a schema: programs fill their templates unseen."""
    head, _, tail = PYDANTIC_FORMAT_TMPL.partition("{schema}")
    start = text.find(head)
    end = text.find(tail, start) + len(tail)
    if start < 0 or end < start + len(head):
        return [Segment(text, kind)]
    cut = [(text[:start], kind), (text[start:end], "literal"), (text[end:], kind)]
    return [Segment(part, of) for part, of in cut if part]


@contextmanager
def telling(told: Told) -> Iterator[None]:
    """Let calls of the model inside the block know what their prompts are made of."""
    token = _told.set(told)
    try:
        yield
    finally:
        _told.reset(token)


def tell(
    llm: LLM, template: BasePromptTemplate, args: Mapping[str, Any], output_cls: Any = None
) -> Told:
    """Read what `llm` is handed for a template; nothing where that can't be told.

    output_cls: of an answer that is an object: a program formats the template, and adds a demand
        instead of what the LLM adds.
    """
    try:
        template = selected(template, llm)
        messages = _messages(template, _values(template, args))
        parsers = [template.output_parser, llm.output_parser]
        if output_cls is not None:
            parsers = [PydanticOutputParser(output_cls)]
        # Not every message, and not every kind of template, gets the demands of parsers.
        if llm.metadata.is_chat_model:
            found = [message.segments for message in messages]
            for parser in filter(None, parsers):
                texts = [[Message(_NO_ROLE, segments)] for segments in found]
                found += [_whole(llm, text, parser, adds=False) for text in texts]
        else:
            adds = output_cls is None
            found = [_whole(llm, messages, own, adds=adds) for own in (None, *parsers[:1])]
    except Exception:  # costs reuse and kinds, no more
        logging.getLogger(__name__).debug(
            "could not read %s", type(template).__name__, exc_info=True
        )
        return {}
    return {"".join(segment.text for segment in segments): segments for segments in found}


def _whole(
    llm: LLM, messages: Sequence[Message], parser: BaseOutputParser | None, *, adds: bool
) -> Sequence[Segment]:
    """Return the segments of one text, with a parser's demands. adds: whether the LLM adds some."""

    def joined(turns: list[dict[str, Any]]) -> str:
        if turns[0]["role"] == _NO_ROLE:
            text: str = turns[0]["content"]
            text = parser.format(text) if parser else text
            text = llm.completion_to_prompt(text) if adds and llm.completion_to_prompt else text
        else:
            chat = [ChatMessage(turn["content"], role=turn["role"]) for turn in turns]
            chat = parser.format_messages(chat) if parser else chat
            text = ((adds and llm.messages_to_prompt) or joined_with_roles)(chat)
        if adds and llm.output_parser:
            text = llm.output_parser.format(text)
        return llm._extend_prompt(text) if adds else text

    return render_chat(messages, joined).segments


def _values(template: BasePromptTemplate, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template's variables are filled with."""
    given = {**template.kwargs, **args}
    made = {name: make(**given) for name, make in (template.function_mappings or {}).items()}
    renamed = template.template_var_mappings or {}
    return {renamed.get(name, name): value for name, value in {**given, **made}.items()}


def _messages(template: BasePromptTemplate, values: Mapping[str, Any]) -> Sequence[Message]:
    if isinstance(template, LlamaTemplate):
        return [Message(_NO_ROLE, _filled(template.template, values))]
    if isinstance(template, ChatPromptTemplate):
        return [_message(message, values) for message in template.message_templates]
    if isinstance(template, RichPromptTemplate):
        return [Message(role or _NO_ROLE, own) for role, own in render_rich(template, values)]
    raise TypeError(f"a {type(template).__name__} does not show its text")


def _message(message: ChatMessage, values: Mapping[str, Any]) -> Message:
    """Cut up a message of a template; one without variables is what somebody said before.

    Chat engines write the history into a template that is made for one call.
    """
    text = message.content or ""
    segments = _filled(text, values)
    if message.role not in TEMPLATE_ROLES and [s.kind for s in segments] == ["literal"]:
        segments = [Segment(text, "argument", message.role.value)]
    return Message(message.role.value, segments)


def _filled(source: str, values: Mapping[str, Any]) -> list[Segment]:
    """Fill a brace template; its text and the values stay apart."""
    segments: list[Segment] = []
    position = 0
    for field in _FIELD.finditer(source):
        if field[1] in values:
            segments.append(Segment(source[position : field.start()], "literal"))
            segments.append(Segment(str(values[field[1]]), "argument", field[1]))
            position = field.end()
    segments.append(Segment(source[position:], "literal"))
    return [segment for segment in segments if segment.text]
