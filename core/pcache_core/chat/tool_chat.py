"""Chats with tools, for templates that know of tools and for those that don't."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from pcache_core.chat.calls import Tool
from pcache_core.chat.messages import Message, Spelled, render_chat
from pcache_core.chat.tools import ApplyToolTemplate, ToolFormat
from pcache_core.errors import ChatTemplateError
from pcache_core.prompt import Prompt, Segment

_ID_LENGTH = 9
_RESULT = ("<tool_response>\n", "\n</tool_response>")


def render_tool_chat(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    form: ToolFormat,
    apply: ApplyToolTemplate,
    spelled: Spelled,
) -> Prompt:
    """Render messages and tools; what tools are there is template text.

    Raises: PromptError: no messages. ChatTemplateError: the template refuses them.
    """
    if form.is_native:
        described = [tool.as_function() for tool in tools]
        named = [_with_short_ids(message) for message in messages]
        return render_chat(named, lambda chat: apply(chat, described), spelled)
    plain = [_in_words(message, form) for message in messages]
    return _with_listing(plain, tools, form, lambda chat: apply(chat, []), spelled)


def _with_short_ids(message: Message) -> Message:
    """Return the message with ids of nine letters and digits: some templates refuse any other."""
    calls = [replace(call, id=_short_id(call.id)) for call in message.tool_calls]
    answered = message.tool_call_id
    return replace(
        message,
        tool_calls=calls,
        tool_call_id=answered if answered is None else _short_id(answered),
    )


def _short_id(call_id: str) -> str:
    if len(call_id) == _ID_LENGTH and call_id.isalnum() and call_id.isascii():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_ID_LENGTH]


def _with_listing(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    form: ToolFormat,
    apply: Callable[[list[dict[str, object]]], str],
    spelled: Spelled,
) -> Prompt:
    """Tell of the tools in the system message, or in the first where there can be none."""
    if not tools or not messages:
        return render_chat(messages, apply, spelled)
    listing = Segment(_listing(tools, form), "literal")
    first, *others = messages
    in_first = replace(first, segments=[listing, Segment("\n\n", "literal"), *first.segments])
    if first.role == "system":
        return render_chat([in_first, *others], apply, spelled)
    try:
        return render_chat([Message("system", [listing]), *messages], apply, spelled)
    except ChatTemplateError:
        return render_chat([in_first, *others], apply, spelled)


def _listing(tools: Sequence[Tool], form: ToolFormat) -> str:
    described = [json.dumps(tool.as_function()["function"], ensure_ascii=False) for tool in tools]
    opening, closing = form.marker + form.opening, form.closing
    example = f'{opening}{{"name": "<name>", "{form.arguments}": {{...}}}}{closing}'
    return "\n".join(["You may call these tools:", *described, "To call one, write:", example])


def _in_words(message: Message, form: ToolFormat) -> Message:
    """Return the message without fields that only templates with tools know."""
    if message.role == "tool":
        opening, closing = (Segment(text, "literal") for text in _RESULT)
        return Message("user", [opening, *message.segments, closing])
    if not message.tool_calls:
        return Message(message.role, message.segments)
    # Arguments are a model's words and may hold anything that a user said.
    written = [Segment(form.write([call]), "argument") for call in message.tool_calls]
    between = Segment("\n", "literal")
    parts = [[*message.segments]] if message.text else []
    parts += [[segment] for segment in written]
    joined = [segment for part in parts for segment in (*part, between)][:-1]
    return Message(message.role, joined)
