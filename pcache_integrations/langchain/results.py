"""The engine's results in LangChain's types."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import (
    ToolCallChunk,
    invalid_tool_call,
    tool_call,
    tool_call_chunk,
)
from langchain_core.outputs import (
    ChatGeneration,
    ChatGenerationChunk,
    ChatResult,
    Generation,
    GenerationChunk,
)

from pcache_core import Chunk, Report, TokenLogprob, ToolAnswer
from pcache_core import Generation as Answer
from pcache_core.report import FinishReason
from pcache_integrations.calls import AnswerReader, Call, reuse_figures


class MessageAnswer:
    """An answer as an assistant's message: whole, or in pieces. Counts come with the last piece."""

    def __init__(self, call: Call, model_name: str) -> None:
        self._call = call
        self._model_name = model_name
        self._reader = AnswerReader(call)
        self._num_calls = 0
        self._has_calls = False

    def whole(self, answer: Answer) -> ChatResult:
        """Return all of it at once."""
        parts = self._call.read(answer.text)
        self._has_calls = bool(parts.calls)
        message = AIMessage(
            content=parts.content,
            tool_calls=[
                tool_call(name=call.name, args=dict(call.arguments), id=call.id)
                for call in parts.calls
            ],
            invalid_tool_calls=[
                invalid_tool_call(name=call.name, args=call.text, id=call.id, error=call.reason)
                for call in parts.invalid
            ],
            usage_metadata=usage_metadata(answer.report),
            response_metadata=self._metadata(answer),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def piece(self, chunk: Chunk) -> ChatGenerationChunk:
        """Return what is known once this chunk has come."""
        content, calls = "", []
        for part in self._reader.parts(chunk):
            content += part.content
            calls += _call_chunks(part, self._num_calls)
            self._num_calls += len(part.calls) + len(part.invalid)
            self._has_calls |= bool(part.calls)
        last: dict[str, Any] = {}
        if chunk.report is not None:
            last = {"chunk_position": "last", "usage_metadata": usage_metadata(chunk.report)}
        metadata = self._metadata(chunk)
        message = AIMessageChunk(
            content=content, tool_call_chunks=calls, response_metadata=metadata, **last
        )
        return ChatGenerationChunk(message=message)

    def _metadata(self, part: Answer | Chunk) -> dict[str, Any]:
        """Say why the answer ended, and what it was made with."""
        metadata: dict[str, Any] = {}
        if part.finish_reason is not None and part.report is not None:
            reason = "tool_calls" if self._has_calls else part.finish_reason
            metadata = {"model_name": self._model_name, "model_provider": "pcache"}
            metadata |= generation_info(reason, part.report)
        if part.logprobs:
            metadata["logprobs"] = chat_logprobs(part.logprobs)
        return metadata


class TextAnswer:
    """An answer of the completion model: whole, or in pieces."""

    def __init__(self) -> None:
        self._chars = 0

    def whole(self, answer: Answer) -> Generation:
        """Return all of it at once."""
        return Generation(text=answer.text, generation_info=self._info(answer))

    def piece(self, chunk: Chunk) -> GenerationChunk:
        """Return one piece; the last one has the counts."""
        return GenerationChunk(text=chunk.text, generation_info=self._info(chunk) or None)

    def _info(self, part: Answer | Chunk) -> dict[str, Any]:
        info: dict[str, Any] = {}
        if part.logprobs:
            info["logprobs"] = completion_logprobs(part.logprobs, self._chars)
            self._chars += sum(len(record.token) for record in part.logprobs)
        if part.finish_reason is not None and part.report is not None:
            info |= generation_info(part.finish_reason, part.report)
        return info


def generation_info(finish_reason: FinishReason | str, report: Report) -> dict[str, Any]:
    """Say why the answer ended, and how much of its prompt was reused."""
    return {"finish_reason": finish_reason, "prompt_cache": reuse_figures(report)}


def usage_metadata(report: Report) -> UsageMetadata:
    """Count tokens. As everywhere in LangChain, the prompt's include those that were cached."""
    return UsageMetadata(
        input_tokens=report.prompt_tokens,
        output_tokens=report.generated_tokens,
        total_tokens=report.prompt_tokens + report.generated_tokens,
        input_token_details=InputTokenDetails(
            cache_read=report.cached_tokens, cache_creation=report.encoded_tokens
        ),
    )


def completion_logprobs(records: Sequence[TokenLogprob], start: int = 0) -> dict[str, Any]:
    """Return tokens' log probabilities in the shape of OpenAI's completions.

    The token that was chosen is among `top_logprobs` as well. Offsets count the answer's
    characters. start: the first token's offset, in a stream's later pieces.
    """
    offsets = accumulate((len(record.token) for record in records), initial=start)
    return {
        "tokens": [record.token for record in records],
        "token_logprobs": [record.logprob for record in records],
        "top_logprobs": [_alternatives(record) for record in records],
        "text_offset": list(offsets)[:-1],
    }


def chat_logprobs(records: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return tokens' log probabilities in the shape of OpenAI's chats."""
    return {
        "content": [
            {**_as_token(record), "top_logprobs": [_as_token(other) for other in record.top]}
            for record in records
        ]
    }


def _as_token(record: TokenLogprob) -> dict[str, Any]:
    return {
        "token": record.token,
        "bytes": list(record.token.encode()),
        "logprob": record.logprob,
    }


def _alternatives(record: TokenLogprob) -> dict[str, float]:
    found: dict[str, float] = {}
    for other in (*record.top, record):
        found.setdefault(other.token, other.logprob)  # of tokens that look alike, the likeliest
    return found


def _call_chunks(answer: ToolAnswer, start: int) -> list[ToolCallChunk]:
    """Return the calls of a piece of an answer. start: how many there were before."""
    parts = [(call.name, call.arguments_text, call.id) for call in answer.calls]
    # What is not a call keeps its markup, so that nobody takes it for one.
    parts += [(call.name or "", call.text, call.id) for call in answer.invalid]
    return [
        tool_call_chunk(name=name, args=args, id=call_id, index=index)
        for index, (name, args, call_id) in enumerate(parts, start=start)
    ]
