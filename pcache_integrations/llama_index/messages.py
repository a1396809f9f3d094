"""The engine's prompts from what LlamaIndex hands over: a text, or messages block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as joined_with_roles
from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock
from llama_index.core.tools import BaseTool

from pcache_core import Message, Prompt, Segment, Tool, ToolCall
from pcache_core.base_engine import Engine
from pcache_core.chat.messages import render_chat
from pcache_core.errors import ChatTemplateError, PromptError
from pcache_core.prompt import SegmentKind
from pcache_integrations._engines import EngineHandle
from pcache_integrations.calls import prompt_from_turns
from pcache_integrations.documents import in_stretches, settle
from pcache_integrations.llama_index.templates import TEMPLATE_ROLES, segments_of

_BETWEEN = "\n"  # as `ChatMessage.content` joins its blocks
# Said elsewhere in the message, or not for the model's eyes. By name, as versions differ in which
# classes they have.
_UNSAID = ("thinking", "tool_call", "citation")


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

    def __init__(self, handle: EngineHandle) -> None:
        self.handle = handle

    def __call__(self, messages: Sequence[ChatMessage]) -> str:
        """Render the messages."""
        engine = self.handle.get()
        if not engine.lm.tokenizer.chat_template:
            return joined_with_roles(messages)
        contents = [[Segment(joined(pieces_of(message)))] for message in messages]
        return prompt_from_turns(engine, _as_turns(messages, contents)).text


def text_prompt(text: str) -> Prompt:
    """Make the prompt of a finished text. Raises: PromptError: it is empty."""
    return _mapped(Prompt.from_text(text))


def wrapped_prompt(text: str, wrap: Callable[[str], str]) -> Prompt:
    """Make the prompt that `wrap` makes of a text by adding something around it."""
    turn = Message("user", segments_of(text, "text"))
    return _mapped(render_chat([turn], lambda turns: wrap(turns[0]["content"])))


def chat_prompt(
    engine: Engine,
    messages: Sequence[ChatMessage],
    to_prompt: Callable[[Sequence[ChatMessage]], str],
    tools: Sequence[Tool] = (),
) -> Prompt:
    """Make the prompt of a chat: by the model's own template, or as the caller's `to_prompt` says.

    tools: that the model may call.
    Raises: PromptError: no messages, or one that the model can't read.
    Raises: ChatTemplateError: the template refuses the messages, or nothing tells of the tools.
    """
    contents = [_content(message, engine.lm.text.holds_special) for message in messages]
    if isinstance(to_prompt, ChatTemplate) and engine.lm.tokenizer.chat_template:
        return prompt_from_turns(engine, _as_turns(messages, contents), tools)
    if tools:
        raise ChatTemplateError(
            f"{len(tools)} tools were given, but nothing tells the model of them: it has no chat "
            "template, or messages_to_prompt= is used instead; leave the tools out, or use a model "
            "with a chat template"
        )
    return _mapped(_render_messages(messages, contents, to_prompt))


def _content(message: ChatMessage, holds_special: Callable[[str], bool]) -> Sequence[Segment]:
    """Cut a message's content; none of it may forge a role mark.

    Chat engines write what was said before into their templates, so even template text may hold
    special tokens that a user typed.
    """
    pieces = pieces_of(message)
    text = joined(pieces)
    if not text:
        return ()
    kind: SegmentKind = "literal" if message.role in TEMPLATE_ROLES else "argument"
    segments = with_borders(segments_of(text, kind), pieces, kind)
    return settle([_as_data(s) if holds_special(s.text) else s for s in segments], text).segments


def _mapped(prompt: Prompt) -> Prompt:
    """Cut known documents out of a prompt whose structure isn't known already."""
    if [segment.kind for segment in prompt.segments] == ["text"]:
        return settle(segments_of(prompt.text, "text"), prompt.text)
    return settle(prompt.segments, prompt.text)


def _as_turns(
    messages: Sequence[ChatMessage], contents: Sequence[Sequence[Segment]]
) -> list[Message]:
    """Return the messages with contents in segments, and with the calls they make or answer."""
    turns: list[Message] = []
    names: dict[str | None, str] = {}
    for message, content in zip(messages, contents, strict=True):
        turn = Message(_ROLES[message.role], content)
        if turn.role == "assistant":
            turn = replace(turn, tool_calls=calls_of(message))
            names |= {call.id: call.name for call in turn.tool_calls}
        elif turn.role == "tool":
            given = message.additional_kwargs.get("tool_call_id")
            call_id = None if given is None else str(given)
            name = message.additional_kwargs.get("name") or names.get(call_id)
            turn = replace(turn, tool_call_id=call_id, name=name)
        turns.append(turn)
    return turns


def _render_messages(
    messages: Sequence[ChatMessage],
    contents: Sequence[Sequence[Segment]],
    to_prompt: Callable[[Sequence[ChatMessage]], str],
) -> Prompt:
    """Render messages with a caller's own `to_prompt`; one `text` segment if it rewrites them."""

    def apply(rendered: list[dict[str, str]]) -> str:
        return to_prompt(
            [
                message.model_copy(update={"blocks": [TextBlock(text=turn["content"])]})
                for message, turn in zip(messages, rendered, strict=True)
            ]
        )

    turns = [Message(_ROLES[m.role], c) for m, c in zip(messages, contents, strict=True)]
    return render_chat(turns, apply)


@dataclass(frozen=True, slots=True)
class Piece:
    """A block's text. is_module: its caller marked it as worth keeping. name: its source's."""

    text: str
    is_module: bool = False
    name: str | None = None


def pieces_of(message: ChatMessage) -> list[Piece]:
    """Return the message's texts. A cache point marks those before it, `cache_control` all of them.

    Raises: PromptError: it holds an image or anything else but text.
    """
    pieces: list[Piece] = []
    for block in message.blocks:
        kind = getattr(block, "block_type", type(block).__name__)
        if kind == "cache":
            pieces = [replace(piece, is_module=True) for piece in pieces]
        elif kind not in _UNSAID:
            pieces.append(_piece(block, kind, message.role.value))
    if message.additional_kwargs.get("cache_control"):
        pieces = [replace(piece, is_module=True) for piece in pieces]
    return pieces


def joined(pieces: Sequence[Piece]) -> str:
    """Return the message's content."""
    return _BETWEEN.join(piece.text for piece in pieces)


def with_borders(
    segments: Sequence[Segment], pieces: Sequence[Piece], kind: SegmentKind
) -> list[Segment]:
    """Cut the segments of the joined pieces, with each marked piece as a module of its own.

    A marked piece that is known to be template text, or to hold documents, stays what it is.

    kind: of what nothing is known. If that is template text, it ends at the last mark: what stands
        after it was left out because it differs from call to call.
    """
    if not any(piece.is_module for piece in pieces):
        return list(segments)
    lengths = chain.from_iterable((len(_BETWEEN), len(piece.text)) for piece in pieces)
    cut = in_stretches(segments, islice(lengths, 1, None))
    done: list[Segment] = []
    after_mark = False
    for number, piece in enumerate(pieces):
        if number:
            done += next(cut)
        own = next(cut)
        if piece.is_module:
            is_known = any(segment.kind in ("literal", "document") for segment in own)
            done += own if is_known else [Segment(piece.text, "document", piece.name)]
            after_mark = True
        else:
            is_data = after_mark and kind == "literal"
            done += [_as_data(part) for part in own] if is_data else own
    return done


def _piece(block: Any, kind: str, role: str) -> Piece:
    if kind == "text":
        return Piece(block.text)
    if kind == "citable" and all(inner.block_type == "text" for inner in block.content):
        text = _BETWEEN.join(inner.text for inner in block.content)
        return Piece(text, is_module=True, name=block.source)
    raise PromptError(
        f"a {role} message holds a {type(block).__name__}; "
        "the model reads text only, leave it out or describe it in words"
    )


def _as_data(segment: Segment) -> Segment:
    return replace(segment, kind="argument") if segment.kind == "literal" else segment


def calls_of(message: ChatMessage) -> list[ToolCall]:
    """Return the calls that a message makes; arguments that are not JSON stay whole."""
    every: list[Any] = list(message.blocks)
    blocks = [b for b in every if getattr(b, "block_type", None) == "tool_call"]
    if blocks:
        return [_call(b.tool_name, b.tool_kwargs, b.tool_call_id) for b in blocks]
    return [_read(given) for given in message.additional_kwargs.get("tool_calls") or ()]


def _read(given: Any) -> ToolCall:
    """Read a call of another provider: a mapping or an object, of OpenAI's shape or flat."""
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


def as_openai(tool: Any) -> Any:
    """Return a tool of LlamaIndex's in OpenAI's shape; anything else as it is."""
    if not isinstance(tool, BaseTool):
        return tool
    return tool.metadata.to_openai_tool(skip_length_check=True)
