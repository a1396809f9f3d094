"""The engine's prompts from what LlamaIndex hands over: a text, or messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from llama_index.core.base.llms.types import ChatMessage

from pcache_core import Message, Prompt, Segment
from pcache_core.chat import render_chat
from pcache_core.prompt import SegmentKind
from pcache_integrations._mapping import settle
from pcache_integrations.llama_index._capture import CAPTURE
from pcache_integrations.llama_index._lazy import LazyEngine, has_chat_template
from pcache_integrations.llama_index._messages import (
    ChatTemplate,
    content_of,
    render_messages,
    role_of,
)


def text_prompt(text: str) -> Prompt:
    """The prompt of a finished text. Raises: PromptError: it is empty."""
    return _mapped(Prompt.from_text(text))


def wrapped_prompt(text: str, wrap: Callable[[str], str]) -> Prompt:
    """The prompt that `wrap` makes of a text by adding something around it."""
    turn = Message("user", CAPTURE.segments(text, "text"))
    return _mapped(render_chat([turn], lambda turns: wrap(turns[0]["content"])))


def chat_prompt(
    lazy: LazyEngine,
    messages: Sequence[ChatMessage],
    system_prompt: str | None,
    to_prompt: Callable[[Sequence[ChatMessage]], str],
) -> Prompt:
    """The prompt of a chat: by the model's own template, or as the caller's `to_prompt` says.

    Raises: PromptError: no messages, or one that the model can't read.
    Raises: ChatTemplateError: the template refuses the messages.
    """
    contents = [_content(message, system_prompt, lazy.special_tokens) for message in messages]
    engine = lazy.get()
    if isinstance(to_prompt, ChatTemplate) and has_chat_template(engine.lm):
        turns = [Message(role_of(m), c) for m, c in zip(messages, contents, strict=True)]
        return engine.prompt_from_chat(turns)
    return _mapped(render_messages(messages, contents, to_prompt))


def _content(
    message: ChatMessage, system_prompt: str | None, special_tokens: Sequence[str]
) -> Sequence[Segment]:
    text = content_of(message)
    if not text:
        return ()
    kind: SegmentKind = "literal" if text == system_prompt else "argument"
    segments = [_as_data(s, special_tokens) for s in CAPTURE.segments(text, kind)]
    return settle(segments, text).segments


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
        segments = CAPTURE.segments(prompt.text, "text")
    return settle(segments, prompt.text)
