"""What a LangChain message says, in segments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from pcache_core import Segment
from pcache_core.errors import PromptError
from pcache_integrations.langchain._watch import WATCHER

_TEXT = ("text", "text-plain", "input_text", "output_text")
# Said elsewhere in the message, or not for the model's eyes.
_UNSAID = (
    "tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call",
    "input_json_delta", "thinking", "redacted_thinking", "reasoning", "reasoning_content",
)  # fmt: skip
_CACHE_HINTS = ("cache_control", "cachePoint", "prompt_cache_breakpoint")


def content_segments(message: BaseMessage, place: int, *, is_last: bool) -> Iterator[Segment]:
    """A message's content: plain data, apart from what a template is known to have written.

    A block of text is a module of its own when the caller marked it for a cache, or when others
    stand behind it. The last block of the last message is what is asked, and is read in full.

    place: in the chat, from 1. is_last: whether this is the chat's last message.
    Raises: PromptError: it holds something else than text.
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
    """The texts of a message, and whether each is marked for a cache."""
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
