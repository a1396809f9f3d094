"""LangChain's messages → chat messages in segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from pcache_core import Message, Prompt, Segment, Tool, ToolCall
from pcache_core.errors import ChatTemplateError, PromptError
from pcache_integrations._engines import Engine
from pcache_integrations.langchain._content import content_segments
from pcache_integrations.langchain._watch import WATCHER

_ROLES = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)


def chat_prompt(
    engine: Engine, messages: Sequence[BaseMessage], tools: Sequence[Tool] = ()
) -> Prompt:
    """Render messages with the model's own chat template.

    Templates that insist on alternating roles get neighbours of the same role as one message.
    tools: that the model may call.
    Raises: PromptError: a message holds something else than text. ChatTemplateError: the model has
        no chat template, or it refuses the messages.
    """
    WATCHER.add_documents(list(messages))
    names = {
        call["id"]: call["name"]
        for message in messages
        if isinstance(message, AIMessage)
        for call in message.tool_calls
    }
    chat = []
    for place, message in enumerate(messages, start=1):
        segments = content_segments(message, place, is_last=place == len(messages))
        plain = Message(_role(message), list(segments))
        chat.append(_with_calls(plain, message, names))
    try:
        return engine.prompt_from_chat(chat, tools)
    except ChatTemplateError:
        merged = _merge_neighbours(chat)
        if len(merged) == len(chat):
            raise
        return engine.prompt_from_chat(merged, tools)


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise PromptError(
        f"a {type(message).__name__} can't be part of a chat with this model; it takes system, "
        "human, AI and tool messages"
    )


def _with_calls(plain: Message, message: BaseMessage, names: dict[str | None, str]) -> Message:
    """The message with the calls it makes, or with the call that it answers."""
    if isinstance(message, AIMessage) and message.tool_calls:
        calls = [
            ToolCall(call["name"], call["args"], call["id"] or "") for call in message.tool_calls
        ]
        return replace(plain, tool_calls=calls)
    if isinstance(message, ToolMessage):
        name = message.name or names.get(message.tool_call_id)
        return replace(plain, tool_call_id=message.tool_call_id, name=name)
    if isinstance(message, FunctionMessage):
        return replace(plain, name=message.name)
    return plain


def _merge_neighbours(chat: Sequence[Message]) -> list[Message]:
    """Neighbours of one role as one message; calls and their results stay what they are."""
    merged: list[Message] = []
    for role, group in groupby(chat, key=lambda message: message.role):
        for message in group:
            last = merged[-1] if merged else None
            if last is None or last.role != role or role == "tool":
                merged.append(message)
                continue
            both = last.text and message.text
            between = [Segment("\n\n", "literal")] if both else []
            merged[-1] = replace(
                last,
                segments=[*last.segments, *between, *message.segments],
                tool_calls=[*last.tool_calls, *message.tool_calls],
            )
    return merged
