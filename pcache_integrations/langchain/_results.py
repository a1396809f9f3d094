"""What a request did, in the words LangChain uses for it."""

from __future__ import annotations

from typing import Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from pcache_core import Report
from pcache_core.results import FinishReason

_REUSE_FIGURES = (
    "reuse", "prompt_tokens", "cached_tokens", "encoded_tokens", "repaired_tokens",
    "computed_tokens", "ttft_ms", "fallback_reason",
)  # fmt: skip


def generation_info(finish_reason: FinishReason, report: Report) -> dict[str, Any]:
    """Why the answer ended, and how much of its prompt was reused."""
    return {
        "finish_reason": finish_reason,
        "prompt_cache": {name: getattr(report, name) for name in _REUSE_FIGURES},
    }


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
