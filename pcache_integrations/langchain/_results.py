"""What a request did, in the words LangChain uses for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from pcache_core import Report, TokenLogprob
from pcache_core.results import FinishReason

_REUSE_FIGURES = (
    "reuse", "prompt_tokens", "cached_tokens", "encoded_tokens", "repaired_tokens",
    "computed_tokens", "ttft_ms", "fallback_reason",
)  # fmt: skip


def generation_info(finish_reason: FinishReason, report: Report) -> dict[str, Any]:
    """Why the answer ended, how much of its prompt was reused, and whose documents it drew on."""
    figures = {name: getattr(report, name) for name in _REUSE_FIGURES}
    sources = [{"id": found.name, "share": found.share} for found in report.documents]
    return {"finish_reason": finish_reason, "prompt_cache": {**figures, "sources": sources}}


def usage_metadata(report: Report) -> UsageMetadata:
    """Token counts. As everywhere in LangChain, the prompt's include those that were cached."""
    return UsageMetadata(
        input_tokens=report.prompt_tokens,
        output_tokens=report.generated_tokens,
        total_tokens=report.prompt_tokens + report.generated_tokens,
        input_token_details=InputTokenDetails(
            cache_read=report.cached_tokens, cache_creation=report.encoded_tokens
        ),
    )


def completion_logprobs(records: Sequence[TokenLogprob], start: int = 0) -> dict[str, Any]:
    """Tokens' log probabilities, in the shape of OpenAI's completions.

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
    """Tokens' log probabilities, in the shape of OpenAI's chats."""
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


def token_usage(reports: list[Report]) -> dict[str, Any]:
    """Token counts of several prompts together, in OpenAI's shape."""
    prompt = sum(report.prompt_tokens for report in reports)
    completion = sum(report.generated_tokens for report in reports)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(report.cached_tokens for report in reports)},
    }
