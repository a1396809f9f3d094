"""LangChain's tools and choices → the core's, and answers → messages with calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.messages import InvalidToolCall
from langchain_core.messages.tool import (
    ToolCall,
    ToolCallChunk,
    invalid_tool_call,
    tool_call,
    tool_call_chunk,
)
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from pcache_core import Tool, ToolAnswer
from pcache_core.errors import OptionError

AnyTool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool
ToolChoice = str | bool | Mapping[str, Any] | None

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_MEANINGS = {"any": "any", "required": "any", "auto": "auto", "none": "none"}


def as_openai(tools: Sequence[AnyTool]) -> list[dict[str, Any]]:
    """Tools in OpenAI's shape. Raises: OptionError: one can't be described."""
    return [_as_openai(tool) for tool in tools]


def _as_openai(tool: AnyTool) -> dict[str, Any]:
    try:
        return convert_to_openai_tool(tool)
    except (TypeError, ValueError) as error:
        raise OptionError(f"a tool can't be described: {error}") from error


def as_core(tools: Sequence[AnyTool]) -> list[Tool]:
    """Tools as the engine takes them."""
    found = []
    for tool in as_openai(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise OptionError(
                f"a tool of type {tool.get('type')!r} is run by a server; this model calls "
                "functions only"
            )
        parameters = function.get("parameters") or _NO_PARAMETERS
        found.append(Tool(function["name"], function.get("description") or "", parameters))
    return found


def as_choice(choice: ToolChoice, tools: Sequence[Tool]) -> str:
    """A choice in any of the shapes providers have: `auto`, `any`, `none` or a tool's name.

    Raises: OptionError: no such tool, or no such shape.
    """
    if choice is None:
        return "auto"
    if isinstance(choice, bool):
        return "any" if choice else "auto"
    if isinstance(choice, Mapping):
        return as_choice(_named(choice), tools)
    if not isinstance(choice, str):
        raise OptionError(
            f"tool_choice must be a tool's name, auto, any, none, or {{'type': 'function', ...}}, "
            f"got {choice!r}"
        )
    names = [tool.name for tool in tools]
    if choice in names:
        return choice
    if choice not in _MEANINGS:
        raise OptionError(
            f"tool_choice={choice!r} names no tool that was given; known are {', '.join(names)}. "
            "Or use auto, any or none"
        )
    return _MEANINGS[choice]


def _named(choice: Mapping[str, Any]) -> str:
    """The name in a mapping of OpenAI's or of Anthropic's."""
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
    kind = choice.get("type")
    if isinstance(name, str):
        return name
    if kind in _MEANINGS:
        return str(kind)
    raise OptionError(
        f"tool_choice={dict(choice)!r} names no tool; for example "
        "{'type': 'function', 'function': {'name': ...}}"
    )


def message_calls(answer: ToolAnswer) -> dict[str, list[ToolCall] | list[InvalidToolCall]]:
    """An answer's calls as fields of a message."""
    return {
        "tool_calls": [
            tool_call(name=call.name, args=dict(call.arguments), id=call.id)
            for call in answer.calls
        ],
        "invalid_tool_calls": [
            invalid_tool_call(name=call.name, args=call.text, id=call.id, error=call.reason)
            for call in answer.invalid
        ],
    }


def call_chunks(answer: ToolAnswer, start: int) -> list[ToolCallChunk]:
    """The calls of a piece of an answer. start: how many there were before."""
    parts = [(call.name, call.arguments_text, call.id) for call in answer.calls]
    # What is no call keeps its markup, so that nobody takes it for one.
    parts += [(call.name or "", call.text, call.id) for call in answer.invalid]
    return [
        tool_call_chunk(name=name, args=args, id=call_id, index=index)
        for index, (name, args, call_id) in enumerate(parts, start=start)
    ]
