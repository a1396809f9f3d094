"""The engine's prompts from what LlamaIndex hands over: a text, or messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from llama_index.core.base.llms.types import ChatMessage

from pcache_core import Message, Prompt, Segment, Tool
from pcache_core.chat import render_chat
from pcache_core.errors import ChatTemplateError
from pcache_core.prompt import SegmentKind
from pcache_integrations._mapping import settle
from pcache_integrations.llama_index._blocks import joined, pieces_of, with_borders
from pcache_integrations.llama_index._lazy import LazyEngine, has_chat_template
from pcache_integrations.llama_index._mapping import TEMPLATE_ROLES, segments_of
from pcache_integrations.llama_index._messages import (
    ChatTemplate,
    as_turns,
    render_messages,
    render_with_template,
)


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
        return render_with_template(engine, as_turns(messages, contents), tools)
    if tools:
        raise ChatTemplateError(
            f"{len(tools)} tools were given, but nothing tells the model of them: it has no chat "
            "template, or messages_to_prompt= is used instead; leave the tools out, or use a model "
            "with a chat template"
        )
    return _mapped(render_messages(messages, contents, to_prompt))


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
