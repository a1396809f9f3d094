"""The engine's results in LlamaIndex's types."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
)

from pcache_core import Chunk, Generation, Report


def completion(generation: Generation) -> CompletionResponse:
    """A whole answer as a completion."""
    return CompletionResponse(
        text=generation.text,
        raw=raw(generation.report),
        additional_kwargs={"finish_reason": generation.finish_reason},
    )


def completions(chunks: Iterator[Chunk]) -> Generator[CompletionResponse, None, None]:
    """A streamed answer as completions, each with the text so far; the last one has the usage."""
    text = ""
    for chunk in chunks:
        text += chunk.text
        yield _partial_completion(chunk, text)


async def acompletions(
    chunks: AsyncIterator[Chunk],
) -> AsyncGenerator[CompletionResponse, None]:
    """As `completions`."""
    text = ""
    async for chunk in chunks:
        text += chunk.text
        yield _partial_completion(chunk, text)


def as_chat(response: CompletionResponse) -> ChatResponse:
    """A completion, whole or partial, as the assistant's message.

    The finish reason stays out of the message, which may become part of a later prompt.
    """
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, content=response.text),
        delta=response.delta,
        raw=response.raw,
        additional_kwargs=response.additional_kwargs,
    )


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
        },
    }


def _partial_completion(chunk: Chunk, text: str) -> CompletionResponse:
    if chunk.report is None:
        return CompletionResponse(text=text, delta=chunk.text)
    return CompletionResponse(
        text=text,
        delta=chunk.text,
        raw=raw(chunk.report),
        additional_kwargs={"finish_reason": chunk.finish_reason},
    )
