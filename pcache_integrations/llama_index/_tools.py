"""LlamaIndex's tools, choices and calls in the core's terms, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import BaseTool

from pcache_core import Tool, ToolCall
from pcache_core.errors import OptionError

ToolChoice = str | bool | Mapping[str, Any] | None

# Newer versions have calls as blocks, older ones in `additional_kwargs` alone.
_CallBlock: Any = getattr(types, "ToolCallBlock", None)
_CALLS = "tool_calls"
_MEANINGS = {"any": "any", "required": "any", "auto": "auto", "none": "none"}


def as_openai(tools: Sequence[BaseTool]) -> list[dict[str, Any]]:
    """Tools in OpenAI's shape, as traces show them."""
    return [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]


def as_core(tools: Iterable[Any]) -> list[Tool]:
    """Tools as the engine takes them; LlamaIndex's own, or mappings of OpenAI's shape.

    Raises: OptionError: it is neither.
    """
    return [_as_tool(tool) for tool in tools]


def _as_tool(tool: Any) -> Tool:
    if isinstance(tool, BaseTool):
        (tool,) = as_openai([tool])
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise OptionError(
            f"a tool must be a LlamaIndex tool or {{'type': 'function', 'function': {{...}}}}, "
            f"got {tool!r}"
        )
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return Tool(function["name"], function.get("description") or "", parameters)


def as_choice(choice: ToolChoice, tools: Sequence[Tool], *, is_required: bool) -> str:
    """A choice in any of the shapes providers have: `auto`, `any`, `none` or a tool's name.

    is_required: what None means. Raises: OptionError: no such tool, or no such shape.
    """
    if choice is None or choice is True or choice is False:
        return "any" if is_required or choice is True else "auto"
    if isinstance(choice, Mapping):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, Mapping) else choice.get("name")
        choice = named or choice.get("type")
    names = [tool.name for tool in tools]
    if choice in names:
        return str(choice)
    if not isinstance(choice, str) or choice not in _MEANINGS:
        raise OptionError(
            f"tool_choice={choice!r} names no tool that was given; known are "
            f"{', '.join(names) or 'none'}. Or use auto, required or none"
        )
    return _MEANINGS[choice]


def message_with_calls(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """The fields of an assistant's message that makes calls."""
    blocks: list[Any] = [TextBlock(text=text)] if text or not calls else []
    if not calls:
        return {"blocks": blocks}
    if _CallBlock is not None:
        blocks += [
            _CallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=dict(call.arguments))
            for call in calls
        ]
    return {"blocks": blocks, "additional_kwargs": {_CALLS: [_as_dict(call) for call in calls]}}


def calls_of(message: ChatMessage) -> list[ToolCall]:
    """The calls that a message makes, this LLM's or another's; arguments that are no JSON whole."""
    every: list[Any] = list(message.blocks)
    blocks = [b for b in every if getattr(b, "block_type", None) == "tool_call"]
    if blocks:
        return [_call(b.tool_name, b.tool_kwargs, b.tool_call_id) for b in blocks]
    return [_read(given) for given in message.additional_kwargs.get(_CALLS) or ()]


def selections(message: ChatMessage) -> list[ToolSelection]:
    """The calls as LlamaIndex's agents take them."""
    return [
        ToolSelection(tool_id=call.id, tool_name=call.name, tool_kwargs=dict(call.arguments))
        for call in calls_of(message)
    ]


def answered_call(message: ChatMessage) -> str | None:
    """The id of the call that a tool's message is the result of."""
    given = message.additional_kwargs.get("tool_call_id")
    return None if given is None else str(given)


def _as_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments_text}
    return {"id": call.id, "type": "function", "function": function}


def _read(given: Any) -> ToolCall:
    """A call of another provider: a mapping or an object, of OpenAI's shape or flat."""
    function = _field(given, "function") or given
    name = _field(function, "name") or _field(function, "tool_name")
    arguments = _field(function, "arguments") or _field(function, "tool_kwargs") or {}
    return _call(str(name), arguments, _field(given, "id") or _field(given, "tool_id"))


def _field(held: Any, name: str) -> Any:
    return held.get(name) if isinstance(held, Mapping) else getattr(held, name, None)


def _call(name: str, arguments: Any, call_id: str | None) -> ToolCall:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {"arguments": arguments}
    if not isinstance(arguments, Mapping):
        arguments = {"arguments": arguments}
    return ToolCall(name, arguments, call_id) if call_id else ToolCall(name, arguments)
