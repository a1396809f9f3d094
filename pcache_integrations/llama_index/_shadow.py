"""A prompt template, formatted once more with marked values, read back as segments.

The call that the user made is never touched: this runs beside it, and what it finds is only used
if it joins to exactly the text that the model is handed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, RichPromptTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate

from pcache_core import Segment
from pcache_integrations.llama_index._marks import Marked, mark_deeply, read_marks
from pcache_integrations.llama_index._objects import demanding
from pcache_integrations.llama_index._templates import has_variables


def shadow(
    llm: LLM, template: BasePromptTemplate, args: Mapping[str, Any], output_cls: Any = None
) -> list[list[Segment]]:
    """The segments of what `llm` is handed for a template: one text, or its messages' contents.

    output_cls: the pydantic class of a structured prediction; its schema is part of the text.
    """
    if isinstance(template, SelectorPromptTemplate):
        template = template.select(llm=llm)
    nonce = secrets.token_hex(8)
    values = {**template.kwargs, **args}
    copy = template.model_copy(update=_marked_parts(template, values, nonce))
    marked = _marked_values(template, values, nonce)
    if output_cls is None:
        texts = _predicted_texts(llm, copy, marked)
    else:
        texts = _structured_texts(llm, demanding(copy, output_cls), marked)
    return [read_marks(text, nonce) for text in texts]


def _predicted_texts(
    llm: LLM, template: BasePromptTemplate, values: Mapping[str, Any]
) -> list[str]:
    """What `llm.predict` and its kin hand over."""
    if llm.metadata.is_chat_model:
        return _contents(llm._get_messages(template, **values))
    return [llm._get_prompt(template, **values)]


def _structured_texts(
    llm: LLM, template: BasePromptTemplate, values: Mapping[str, Any]
) -> list[str]:
    """What the program behind `llm.structured_predict` hands over."""
    if llm.metadata.is_chat_model:
        return _contents(llm._extend_messages(template.format_messages(llm=llm, **values)))
    return [template.format(llm=llm, **values)]


def _contents(messages: list[ChatMessage]) -> list[str]:
    return [message.content for message in messages if message.content]


def _marked_values(
    template: BasePromptTemplate, values: Mapping[str, Any], nonce: str
) -> dict[str, Any]:
    """Jinja templates loop over values, so these keep their shape; the others only write them."""
    if isinstance(template, RichPromptTemplate):
        return {name: mark_deeply(value, name, nonce) for name, value in values.items()}
    return {
        # Bytes are decoded by the template, not written with str().
        name: value if isinstance(value, bytes) else Marked(str(value), name, nonce)
        for name, value in values.items()
    }


def _marked_parts(
    template: BasePromptTemplate, values: Mapping[str, Any], nonce: str
) -> dict[str, Any]:
    """The template's fields that hold data of their own: functions' results and chat turns."""
    parts: dict[str, Any] = {}
    if template.function_mappings:
        parts["function_mappings"] = {
            name: _marking_its_result(function, values, name, nonce)
            for name, function in template.function_mappings.items()
        }
    if isinstance(template, ChatPromptTemplate):
        parts["message_templates"] = [
            _mark_turn(message, nonce) for message in template.message_templates
        ]
    return parts


def _marking_its_result(
    function: Callable[..., Any], values: Mapping[str, Any], name: str, nonce: str
) -> Callable[..., Any]:
    def marked(**_: Any) -> Any:
        return mark_deeply(function(**values), name, nonce)

    return marked


def _mark_turn(message: ChatMessage, nonce: str) -> ChatMessage:
    """Mark a turn of the conversation so far as data.

    Chat engines put the history into a template made for one call. A turn is what somebody said,
    not template text: no one else's prompt will hold it.
    """
    if message.role in (MessageRole.SYSTEM, MessageRole.DEVELOPER) or has_variables(message):
        return message
    blocks = [
        TextBlock(text=str(Marked(block.text, message.role.value, nonce)))
        if isinstance(block, TextBlock)
        else block
        for block in message.blocks
    ]
    return message.model_copy(update={"blocks": blocks})
