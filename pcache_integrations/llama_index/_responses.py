"""The engine's results in LlamaIndex's types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LogProb,
    MessageRole,
)

from pcache_core import Chunk, Generation, Report, Tool, ToolAnswer, ToolCall, ToolFormat
from pcache_core.results import FinishReason, TokenLogprob
from pcache_integrations.llama_index._tools import message_with_calls


class CompletionAnswer:
    """An answer as completions: whole, or in pieces, each of which has the text so far."""

    def __init__(self) -> None:
        self._text = ""

    def whole(self, generation: Generation) -> CompletionResponse:
        """All of it at once."""
        self._text = generation.text
        return self._response(None, generation)

    def piece(self, chunk: Chunk) -> CompletionResponse:
        """What is known once this chunk has come; the last one has the usage."""
        self._text += chunk.text
        return self._response(chunk.text, chunk)

    def _response(self, delta: str | None, part: Chunk | Generation) -> CompletionResponse:
        return CompletionResponse(text=self._text, delta=delta, **_about(part, part.finish_reason))


class ChatAnswer:
    """An answer as an assistant's messages: whole, or in pieces, each with all that came so far.

    form, tools: of the calls that the answer may hold. most_calls: further ones are left out.
    What was meant as a call and is none stays in the text. The finish reason stays out of the
    message, which may become part of a later prompt.
    """

    def __init__(self, form: ToolFormat | None, tools: Sequence[Tool], most_calls: int) -> None:
        self._form = form
        self._tools = tools
        self._most_calls = most_calls
        self._reader = form.reader(tools) if form else None
        self._text = ""
        self._calls: list[ToolCall] = []

    def whole(self, generation: Generation) -> ChatResponse:
        """All of it at once."""
        text = generation.text
        parts = self._form.read(text, self._tools) if self._form else ToolAnswer(text)
        self._take(parts)
        return self._response(None, generation)

    def piece(self, chunk: Chunk) -> ChatResponse:
        """What is known once this chunk has come; the last one has the usage."""
        before = len(self._text)
        if self._reader is None:
            self._text += chunk.text
        else:
            self._take(self._reader.add(chunk.text))
            if chunk.finish_reason is not None:
                self._take(self._reader.finish())
        return self._response(self._text[before:], chunk)

    def _take(self, parts: ToolAnswer) -> None:
        for text in (parts.content, *(call.text for call in parts.invalid)):
            self._text += text
        self._calls = [*self._calls, *parts.calls][: self._most_calls]

    def _response(self, delta: str | None, part: Chunk | Generation) -> ChatResponse:
        reason = "tool_calls" if part.finish_reason and self._calls else part.finish_reason
        message = ChatMessage(
            role=MessageRole.ASSISTANT, **message_with_calls(self._text, self._calls)
        )
        return ChatResponse(message=message, delta=delta, **_about(part, reason))


def raw(report: Report) -> dict[str, Any]:
    """Usage as OpenAI reports it, which is what LlamaIndex's token counters read, and the rest."""
    return {
        "usage": {
            "prompt_tokens": report.prompt_tokens,
            "completion_tokens": report.generated_tokens,
            "total_tokens": report.prompt_tokens + report.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": report.cached_tokens},
        },
        "prompt_cache": {
            "reuse": report.reuse,
            "prompt_tokens": report.prompt_tokens,
            "cached_tokens": report.cached_tokens,
            "encoded_tokens": report.encoded_tokens,
            "repaired_tokens": report.repaired_tokens,
            "computed_tokens": report.computed_tokens,
            "ttft_ms": report.ttft_ms,
            "fallback_reason": report.fallback_reason,
            "sources": [{"id": found.name, "share": found.share} for found in report.documents],
        },
    }


def _about(part: Chunk | Generation, reason: FinishReason | str | None) -> dict[str, Any]:
    """What a response says beside its text."""
    fields: dict[str, Any] = {}
    if part.logprobs:
        fields["logprobs"] = [_alternatives(record) for record in part.logprobs]
    if part.report is not None:
        fields |= {"raw": raw(part.report), "additional_kwargs": {"finish_reason": reason}}
    return fields


def _alternatives(record: TokenLogprob) -> list[LogProb]:
    """The token that was chosen, then the others that were asked for."""
    others = [other for other in record.top if other.token_id != record.token_id]
    return [
        LogProb(token=one.token, logprob=one.logprob, bytes=list(one.token.encode()))
        for one in (record, *others)
    ]
