"""The engine's prompts from what LlamaIndex hands over: a text, or messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from llama_index.core.base.llms.generic_utils import messages_to_prompt as joined_with_roles
from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from pcache_core import Message, Prompt, Segment, Tool
from pcache_core.chat.messages import render_chat
from pcache_core.errors import ChatTemplateError
from pcache_core.prompt import SegmentKind
from pcache_integrations._engines import Engine
from pcache_integrations._mapping import settle
from pcache_integrations.llama_index._blocks import joined, pieces_of, with_borders
from pcache_integrations.llama_index._lazy import LazyEngine, has_chat_template
from pcache_integrations.llama_index._mapping import TEMPLATE_ROLES, segments_of
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
        return _render_with_template(engine, _as_turns(messages, contents), ()).text


def text_prompt(text: str) -> Prompt:
    """The prompt of a finished text. Raises: PromptError: it is empty."""
    return _mapped(Prompt.from_text(text))


def wrapped_prompt(text: str, wrap: Callable[[str], str]) -> Prompt:
    """The prompt that `wrap` makes of a text by adding something around it."""
    turn = Message("user", segments_of(text, "text"))
    return _mapped(render_chat([turn], lambda turns: wrap(turns[0]["content"])))


def chat_prompt(
    lazy: LazyEngine,
    messages: Sequence[ChatMessage],
    to_prompt: Callable[[Sequence[ChatMessage]], str],
    tools: Sequence[Tool] = (),
) -> Prompt:
    """The prompt of a chat: by the model's own template, or as the caller's `to_prompt` says.

    tools: that the model may call.
    Raises: PromptError: no messages, or one that the model can't read.
    Raises: ChatTemplateError: the template refuses the messages, or nothing tells of the tools.
    """
    contents = [_content(message, lazy.special_tokens) for message in messages]
    engine = lazy.get()
    if isinstance(to_prompt, ChatTemplate) and has_chat_template(engine.lm):
        return _render_with_template(engine, _as_turns(messages, contents), tools)
    if tools:
        raise ChatTemplateError(
            f"{len(tools)} tools were given, but nothing tells the model of them: it has no chat "
            "template, or messages_to_prompt= is used instead; leave the tools out, or use a model "
            "with a chat template"
        )
    return _mapped(_render_messages(messages, contents, to_prompt))


def _content(message: ChatMessage, special_tokens: Sequence[str]) -> Sequence[Segment]:
    pieces = pieces_of(message)
    text = joined(pieces)
    if not text:
        return ()
    kind: SegmentKind = "literal" if message.role in TEMPLATE_ROLES else "argument"
    segments = with_borders(segments_of(text, kind), pieces, kind)
    return settle([_as_data(s, special_tokens) for s in segments], text).segments


def _as_data(segment: Segment, special_tokens: Sequence[str]) -> Segment:
    """Keep a content from forging a role mark.

    Chat engines write what was said before into their templates, so even template text may hold
    special tokens that a user typed.
    """
    if segment.kind == "literal" and any(token in segment.text for token in special_tokens):
        return replace(segment, kind="argument")
    return segment


def _mapped(prompt: Prompt) -> Prompt:
    """The prompt with known documents cut out of it, if its structure isn't known already."""
    segments: Sequence[Segment] = prompt.segments
    if [segment.kind for segment in segments] == ["text"]:
        segments = segments_of(prompt.text, "text")
    return settle(segments, prompt.text)


def _as_turns(
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


def _render_with_template(
    engine: Engine, turns: Sequence[Message], tools: Sequence[Tool]
) -> Prompt:
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


def _render_messages(
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
