"""LangChain's messages → chat messages in segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from pcache_core import Message, Prompt, PromptCacheEngine, Segment
from pcache_core.errors import ChatTemplateError, PromptError
from pcache_integrations._recurring import Ids
from pcache_integrations.langchain._provenance import PROVENANCE

_ROLES = ((SystemMessage, "system"), (HumanMessage, "user"), (AIMessage, "assistant"))


def chat_prompt(
    engine: PromptCacheEngine, messages: Sequence[BaseMessage], *, recurring_text: bool = True
) -> Prompt:
    """Render messages with the model's own chat template.

    Templates that insist on alternating roles get neighbours of the same role as one message.
    recurring_text: whether blocks of text that come back become modules.

    Raises: PromptError: a message holds something else than text. ChatTemplateError: the model has
        no chat template, or it refuses the messages.
    """
    PROVENANCE.add_documents(messages)
    recurring = _recurring_places(messages) if recurring_text else set()
    ids = engine.lm.text.ids
    chat = [
        Message(
            role=_role(message),
            segments=list(_segments(message, place, ids if place in recurring else None)),
        )
        for place, message in enumerate(messages, start=1)
    ]
    try:
        return engine.prompt_from_chat(chat)
    except ChatTemplateError:
        merged = _merge_neighbours(chat)
        if len(merged) == len(chat):
            raise
        return engine.prompt_from_chat(merged)


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise PromptError(
        f"a {type(message).__name__} can't be part of a chat with this model; it takes system, "
        "human and AI messages, and tool calls are not supported by this version"
    )


def _recurring_places(messages: Sequence[BaseMessage]) -> set[int]:
    """Messages that may hold passages: a user's earlier ones are theirs, and no documents."""
    humans = [n for n, message in enumerate(messages, 1) if isinstance(message, HumanMessage)]
    others = [n for n, m in enumerate(messages, 1) if isinstance(m, (SystemMessage, ToolMessage))]
    return {*humans[-1:], *others}


def _segments(message: BaseMessage, place: int, ids: Ids | None) -> Iterator[Segment]:
    """A message's content: plain data, apart from what a template is known to have written.

    ids: tokenises a segment, if text that comes back is looked for.
    """
    if isinstance(message, AIMessage) and message.tool_calls:
        raise PromptError(
            f"message {place} has tool calls, which are not supported by this version; "
            "leave it out of the history"
        )
    content = [message.content] if isinstance(message.content, str) else message.content
    for block in content:
        if isinstance(block, dict) and block.get("type") != "text":
            raise PromptError(
                f"message {place} has a content block of type {block.get('type')!r}; this model "
                "reads only text"
            )
        text = block if isinstance(block, str) else str(block.get("text", ""))
        yield from PROVENANCE.segments(text, "argument", ids)


def _merge_neighbours(chat: Sequence[Message]) -> list[Message]:
    merged = []
    for role, group in groupby(chat, key=lambda message: message.role):
        segments: list[Segment] = []
        for message in group:
            if segments:
                segments.append(Segment("\n\n", "literal"))
            segments += message.segments
        merged.append(Message(role=role, segments=segments))
    return merged
