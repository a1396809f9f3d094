"""LlamaIndex's chat messages in the engine's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from llama_index.core.base.llms.generic_utils import messages_to_prompt as joined_with_roles
from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from pcache_core import Message, Prompt, Segment, Tool
from pcache_core.chat import render_chat
from pcache_core.errors import ChatTemplateError
from pcache_integrations._engines import Engine
from pcache_integrations.llama_index._blocks import joined, pieces_of
from pcache_integrations.llama_index._lazy import LazyEngine, has_chat_template
from pcache_integrations.llama_index._tools import answered_call, calls_of

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}


class ChatTemplate:
    """Messages to the text the model's own chat template makes of them.

    Without a template, LlamaIndex's plain form: a line "role: content" for each message.

    Raises: ChatTemplateError: the template refuses the messages.
    """

    def __init__(self, lazy: LazyEngine) -> None:
        self._lazy = lazy

    def __call__(self, messages: Sequence[ChatMessage]) -> str:
        engine = self._lazy.get()
        if not has_chat_template(engine.lm):
            return joined_with_roles(messages)
        contents = [[Segment(joined(pieces_of(message)))] for message in messages]
        return render_with_template(engine, as_turns(messages, contents), ()).text


def as_turns(
    messages: Sequence[ChatMessage], contents: Sequence[Sequence[Segment]]
) -> list[Message]:
    """The messages with contents in segments, and with the calls they make or answer."""
    turns: list[Message] = []
    names: dict[str | None, str] = {}
    for message, content in zip(messages, contents, strict=True):
        turn = Message(_ROLES[message.role], content)
        if turn.role == "assistant":
            turn = replace(turn, tool_calls=calls_of(message))
            names |= {call.id: call.name for call in turn.tool_calls}
        elif turn.role == "tool":
            call_id = answered_call(message)
            name = message.additional_kwargs.get("name") or names.get(call_id)
            turn = replace(turn, tool_call_id=call_id, name=name)
        turns.append(turn)
    return turns


def render_with_template(engine: Engine, turns: Sequence[Message], tools: Sequence[Tool]) -> Prompt:
    """Render by the model's own template.

    Templates that insist on alternating roles, or know no system message, get neighbours of the
    same role as one message, and the system message as a part of the first one.

    Raises: PromptError: no messages. ChatTemplateError: the template refuses all of that.
    """
    try:
        return engine.prompt_from_chat(turns, tools)
    except ChatTemplateError:
        for gentler in (_merged(turns), _merged(_without_system(turns))):
            if gentler != list(turns):
                try:
                    return engine.prompt_from_chat(gentler, tools)
                except ChatTemplateError:
                    continue
        raise


def render_messages(
    messages: Sequence[ChatMessage],
    contents: Sequence[Sequence[Segment]],
    to_prompt: Callable[[Sequence[ChatMessage]], str],
) -> Prompt:
    """What a caller's own `to_prompt` makes of the messages, with the segments of their contents.

    One `text` segment if it rewrites them.
    """

    def apply(rendered: list[dict[str, str]]) -> str:
        return to_prompt(
            [
                message.model_copy(update={"blocks": [TextBlock(text=turn["content"])]})
                for message, turn in zip(messages, rendered, strict=True)
            ]
        )

    turns = [Message(_ROLES[m.role], c) for m, c in zip(messages, contents, strict=True)]
    return render_chat(turns, apply)


def _merged(turns: Sequence[Message]) -> list[Message]:
    """Neighbours of one role as one message; results of calls stay apart."""
    merged: list[Message] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if last is None or last.role != turn.role or turn.role == "tool":
            merged.append(turn)
            continue
        between = [Segment("\n\n", "literal")] if last.text and turn.text else []
        merged[-1] = replace(
            last,
            segments=[*last.segments, *between, *turn.segments],
            tool_calls=[*last.tool_calls, *turn.tool_calls],
        )
    return merged


def _without_system(turns: Sequence[Message]) -> list[Message]:
    return [replace(turn, role="user") if turn.role == "system" else turn for turn in turns]
