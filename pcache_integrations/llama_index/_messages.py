"""LlamaIndex's chat messages in the engine's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_index.core.base.llms.generic_utils import messages_to_prompt as joined_with_roles
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)

from pcache_core import Message, Prompt, Segment
from pcache_core.chat import render_chat
from pcache_core.errors import PromptError
from pcache_integrations.llama_index._lazy import LazyEngine, has_chat_template

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.CHATBOT: "assistant",
}
# A cache point is another provider's hint; thoughts are not given back to the model.
_SILENT_BLOCKS = (CachePoint, ThinkingBlock)


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
        return engine.prompt_from_chat(
            [Message(role_of(m), [Segment(content_of(m))]) for m in messages]
        ).text


def role_of(message: ChatMessage) -> str:
    """`system`, `user` or `assistant`. Raises: PromptError: any other role."""
    role = _ROLES.get(message.role)
    if role is None:
        raise PromptError(
            f"a message has the role {message.role.value!r}, which has no place in the model's "
            f"prompt; use one of {', '.join(sorted(set(_ROLES.values())))}"
        )
    return role


def content_of(message: ChatMessage) -> str:
    """The message's text. Raises: PromptError: it holds an image or anything else but text."""
    for block in message.blocks:
        if not isinstance(block, (TextBlock, *_SILENT_BLOCKS)):
            raise PromptError(
                f"a {message.role.value} message holds a {type(block).__name__}; "
                "the model reads text only, leave it out or describe it in words"
            )
    return message.content or ""


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

    turns = [Message(role_of(m), c) for m, c in zip(messages, contents, strict=True)]
    return render_chat(turns, apply)
