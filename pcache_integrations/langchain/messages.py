"""LangChain's messages and tools → chat messages in segments, and tools of OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from pcache_core import Message, Prompt, Segment, Tool, ToolCall
from pcache_core.base_engine import Engine
from pcache_core.errors import OptionError, PromptError
from pcache_integrations.calls import prompt_from_turns
from pcache_integrations.langchain.watch import WATCHER

AnyTool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool

_ROLES = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)


_TEXT = ("text", "text-plain", "input_text", "output_text")
# Said elsewhere in the message, or not for the model's eyes.
_UNSAID = (
    "tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call",
    "input_json_delta", "thinking", "redacted_thinking", "reasoning", "reasoning_content",
)  # fmt: skip
_CACHE_HINTS = ("cache_control", "cachePoint", "prompt_cache_breakpoint")


def as_openai(tools: Sequence[AnyTool]) -> list[dict[str, Any]]:
    """Return tools in OpenAI's shape. Raises: OptionError: one can't be described."""
    try:
        return [convert_to_openai_tool(tool) for tool in tools]
    except (TypeError, ValueError) as error:
        raise OptionError(f"a tool can't be described: {error}") from error


def chat_prompt(
    engine: Engine, messages: Sequence[BaseMessage], tools: Sequence[Tool] = ()
) -> Prompt:
    """Render messages with the model's own chat template.

    tools: that the model may call.
    Raises: PromptError: a message holds something other than text. ChatTemplateError: the model has
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
        segments = _content(message, place, is_last=place == len(messages))
        plain = Message(_role(message), list(segments))
        chat.append(_with_calls(plain, message, names))
    return prompt_from_turns(engine, chat, tools)


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
    """Return the message with the calls it makes, or with the call that it answers."""
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


def _content(message: BaseMessage, place: int, *, is_last: bool) -> Iterator[Segment]:
    """Cut a message's content: plain data, apart from what a template is known to have written.

    A block of text is a module of its own when the caller marked it for a cache, or when others
    come after it. The last block of the last message is what is asked, and is read in full.

    place: in the chat, from 1. is_last: whether this is the chat's last message.
    Raises: PromptError: it holds something other than text.
    """
    if isinstance(message, ToolMessage) and message.status == "error":
        yield Segment("Error: ", "literal")
    blocks = _blocks(message, place)
    for number, (text, is_marked) in enumerate(blocks, start=1):
        is_asked = is_last and number == len(blocks)
        is_module = is_marked or (len(blocks) > 1 and not is_asked)
        yield from _block_segments(text, is_module=is_module)
    if isinstance(message, AIMessage):
        for call in message.invalid_tool_calls:
            yield Segment(call["args"] or "", "argument")


def _block_segments(text: str, *, is_module: bool) -> list[Segment]:
    segments = WATCHER.segments(text, "argument")
    if is_module and [segment.kind for segment in segments] == ["argument"]:
        return [Segment(text, "document")]
    return segments


def _blocks(message: BaseMessage, place: int) -> list[tuple[str, bool]]:
    """Return the texts of a message, and whether each is marked for a cache."""
    if isinstance(message.content, str):
        return [(message.content, False)] if message.content else []
    found = []
    for block in message.content:
        text = block if isinstance(block, str) else _text(block, place)
        if text:
            is_marked = isinstance(block, dict) and any(block.get(hint) for hint in _CACHE_HINTS)
            found.append((text, is_marked))
    return found


def _text(block: dict[str, Any], place: int) -> str:
    kind = block.get("type")
    if kind in _TEXT:
        return str(block.get("text", ""))
    if kind in _UNSAID or (kind is None and any(hint in block for hint in _CACHE_HINTS)):
        return ""
    if kind == "tool_result":
        inner = block.get("content", "")
        return inner if isinstance(inner, str) else "".join(_text(part, place) for part in inner)
    raise PromptError(
        f"message {place} has a content block of type {kind!r}; this model reads only text"
    )
