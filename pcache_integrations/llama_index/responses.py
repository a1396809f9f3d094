"""The engine's results and refusals in LlamaIndex's types."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index import core
from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LogProb,
    MessageRole,
    TextBlock,
)

from pcache_core import Chunk, Generation, ToolAnswer, ToolCall
from pcache_core.errors import ContextLengthError, PromptCacheError
from pcache_core.report import FinishReason, TokenLogprob
from pcache_integrations.calls import AnswerReader, Call, reuse_figures, usage
from pcache_integrations.llama_index.model import Tokenizer

_logger = logging.getLogger(__name__)

# Newer versions have calls as blocks, older ones in `additional_kwargs` alone.
_CallBlock: Any = getattr(types, "ToolCallBlock", None)


class CallRefusedError(PromptCacheError):
    """What was asked of the LLM can't be done; the cause is the error that says why.

    LlamaIndex's engines take a ValueError or a TypeError for an answer that they can't parse, and
    go on without it. This is neither.
    """


@contextmanager
def loud_refusals() -> Iterator[None]:
    """Raise what LlamaIndex would swallow as `CallRefusedError`.

    It is logged as well, as some engines swallow every exception.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        remedy = ""
        counts_alike = isinstance(getattr(core, "global_tokenizer", None), Tokenizer)
        if isinstance(error, ContextLengthError) and not counts_alike:
            remedy = (
                ". LlamaIndex counts tokens with another tokenizer: call "
                "llm.set_global_tokenizer() before documents are split"
            )
        _logger.warning("a call was refused: %s%s", error, remedy)
        raise CallRefusedError(f"{error}{remedy}") from error


class CompletionAnswer:
    """An answer as completions: whole, or in pieces, each of which has the text so far."""

    def __init__(self) -> None:
        self._text = ""

    def whole(self, generation: Generation) -> CompletionResponse:
        """Return all of it at once."""
        self._text = generation.text
        return self._response(None, generation)

    def piece(self, chunk: Chunk) -> CompletionResponse:
        """Return what is known once this chunk has come; the last one has the usage."""
        self._text += chunk.text
        return self._response(chunk.text, chunk)

    def _response(self, delta: str | None, part: Chunk | Generation) -> CompletionResponse:
        return CompletionResponse(text=self._text, delta=delta, **_about(part, part.finish_reason))


class ChatAnswer:
    """An answer as an assistant's messages: whole, or in pieces, each with all that came so far.

    More calls than were asked for are left out, and what was meant as a call and is none stays in
    the text. The finish reason stays out of the message, which may become part of a later prompt.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._reader = AnswerReader(call)
        self._text = ""
        self._calls: list[ToolCall] = []

    def whole(self, generation: Generation) -> ChatResponse:
        """Return all of it at once."""
        self._take(self._call.read(generation.text))
        return self._response(None, generation)

    def piece(self, chunk: Chunk) -> ChatResponse:
        """Return what is known once this chunk has come; the last one has the usage."""
        before = len(self._text)
        for parts in self._reader.parts(chunk):
            self._take(parts)
        return self._response(self._text[before:], chunk)

    def _take(self, parts: ToolAnswer) -> None:
        for text in (parts.content, *(call.text for call in parts.invalid)):
            self._text += text
        self._calls = [*self._calls, *parts.calls][: self._call.most_calls]

    def _response(self, delta: str | None, part: Chunk | Generation) -> ChatResponse:
        reason = "tool_calls" if part.finish_reason and self._calls else part.finish_reason
        message = ChatMessage(role=MessageRole.ASSISTANT, **_with_calls(self._text, self._calls))
        return ChatResponse(message=message, delta=delta, **_about(part, reason))


def _about(part: Chunk | Generation, reason: FinishReason | str | None) -> dict[str, Any]:
    """Return what a response says beside its text."""
    fields: dict[str, Any] = {}
    if part.logprobs:
        fields["logprobs"] = [_alternatives(record) for record in part.logprobs]
    if part.report is not None:
        # As OpenAI reports it, which is what LlamaIndex's token counters read, and the rest.
        told = {"usage": usage([part.report]), "prompt_cache": reuse_figures(part.report)}
        fields |= {"raw": told, "additional_kwargs": {"finish_reason": reason}}
    return fields


def _alternatives(record: TokenLogprob) -> list[LogProb]:
    """Return the token that was chosen, then the others that were asked for."""
    others = [other for other in record.top if other.token_id != record.token_id]
    return [
        LogProb(token=one.token, logprob=one.logprob, bytes=list(one.token.encode()))
        for one in (record, *others)
    ]


def _with_calls(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """Return the fields of an assistant's message that makes calls."""
    blocks: list[Any] = [TextBlock(text=text)] if text or not calls else []
    if not calls:
        return {"blocks": blocks}
    if _CallBlock is not None:
        blocks += [
            _CallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=dict(call.arguments))
            for call in calls
        ]
    return {
        "blocks": blocks,
        "additional_kwargs": {"tool_calls": [_as_dict(call) for call in calls]},
    }


def _as_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments_text}
    return {"id": call.id, "type": "function", "function": function}
