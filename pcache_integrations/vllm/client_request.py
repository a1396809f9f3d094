"""A prompt as a request to a server, and the server's events as the engine's chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pcache_core.errors import ContextLengthError, ModelError
from pcache_core.generate import TokenScorer
from pcache_core.grammar import Grammar
from pcache_core.lm import TextModel
from pcache_core.params import ReuseMode, SamplingParams
from pcache_core.prompt import Piece, TokenisedPrompt
from pcache_core.report import Chunk, Report, SegmentReport, Source, TokenLogprob
from pcache_integrations.vllm.client_modules import Module
from pcache_integrations.vllm.protocol import LOAD, Run, exact_salt, fast_salt

_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class ServedRequest:
    """A checked request.

    reuse: the mode that can run. runs: the states to ask for. modules: what to have encoded if the
    server lacks it.
    """

    tokens: TokenisedPrompt
    params: SamplingParams
    reuse: ReuseMode
    fallback_reason: str | None
    namespace: str | None
    runs: Sequence[Run] = ()
    modules: Sequence[Module] = ()

    def body(self, lm: TextModel) -> dict[str, Any]:
        """Return it as the server's completions take it.

        Raises: ContextLengthError: the prompt leaves no room for an answer.
        """
        params, ids = self.params, self.tokens.token_ids
        most = params.max_tokens
        if lm.context_length is not None:
            most = min(most, lm.context_length - len(ids))
            if most < 1:
                raise ContextLengthError(
                    f"the prompt has {len(ids)} tokens, {lm.name} holds {lm.context_length} with "
                    "the answer; use fewer or shorter documents"
                )
        body: dict[str, Any] = {
            "model": lm.name,
            "prompt": list(ids),
            "max_tokens": most,
            "temperature": params.temperature if params.temperature >= _LEAST_TEMPERATURE else 0,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "stop": list(params.stop),
            "stop_token_ids": [*params.stop_token_ids, *sorted(lm.stop_ids(params.stop))],
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._of_reuse(),
        }
        if params.seed is not None:
            body["seed"] = params.seed
        if params.logprobs is not None:
            body |= {"logprobs": params.logprobs, "return_tokens_as_token_ids": True}
        if params.grammar is not None:
            body["structured_outputs"] = _structured(params.grammar)
        return body

    def _of_reuse(self) -> dict[str, Any]:
        if self.reuse == "off":
            # A salt that nobody had before finds nothing in the server's prefix cache.
            return {"cache_salt": secrets.token_urlsafe(32)}
        if self.namespace is None:
            return {}
        if self.reuse == "exact":
            return {"cache_salt": exact_salt(self.namespace)}
        runs = [run.as_list() for run in self.runs]
        return {"cache_salt": fast_salt(self.namespace), "kv_transfer_params": {LOAD: runs}}


def _structured(grammar: Grammar) -> dict[str, Any]:
    """Return it as vLLM's guidance backend takes it: a JSON schema, or Lark."""
    if not grammar.source.startswith("{"):
        return {"grammar": grammar.source}
    (own,) = json.loads(grammar.source)["grammars"]
    return {"json": own["json_schema"]}


@dataclass(slots=True, eq=False)
class Answer:
    """Turns a stream's events into chunks, and in the end into a report.

    started: when the request was made, by `time.perf_counter`.
    """

    request: ServedRequest
    lm: TextModel
    started: float
    _ttft_ms: float = 0.0
    _cached: int = 0
    _generated: int = 0
    _finish_reason: Any = None
    _scorer: TokenScorer = field(init=False)

    def __post_init__(self) -> None:
        self._scorer = TokenScorer(self.lm.text.decode, self.request.params.logprobs)

    def chunks(self, event: Mapping[str, Any]) -> Iterator[Chunk]:
        """Yield what an event adds, if anything."""
        usage = event.get("usage")
        if usage:
            details = usage.get("prompt_tokens_details") or {}
            self._cached = details.get("cached_tokens") or 0
            self._generated = usage.get("completion_tokens") or 0
        for choice in event.get("choices") or ():
            self._ttft_ms = self._ttft_ms or (time.perf_counter() - self.started) * 1000
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            ids = tuple(choice.get("token_ids") or ())
            yield Chunk(choice["text"], ids, logprobs=self._logprobs(ids, choice.get("logprobs")))

    def last(self) -> Chunk:
        """Return the chunk after all others. Raises: ModelError: the answer is not complete."""
        reason = self._finish_reason
        if reason not in ("stop", "length"):
            raise ModelError(f"{self.lm.name}: the server gave the answer up ({reason})")
        return Chunk("", (), reason, self._report())

    def _logprobs(
        self, ids: Sequence[int], given: Mapping[str, Any] | None
    ) -> tuple[TokenLogprob, ...]:
        count = self.request.params.logprobs
        if count is None or not given:
            return ()
        records = []
        alternatives = given.get("top_logprobs") or [None] * len(ids)
        for token_id, logprob, others in zip(
            ids, given["token_logprobs"], alternatives, strict=True
        ):
            pairs = (
                (int(name.rpartition(":")[2]), value) for name, value in (others or {}).items()
            )
            likeliest = sorted(pairs, key=lambda pair: -pair[1])[:count]
            records.append(self._scorer.record(token_id, logprob, likeliest))
        return tuple(records)

    def _report(self) -> Report:
        request, total = self.request, len(self.request.tokens.token_ids)
        cached = min(self._cached, total)
        return Report(
            segments=tuple(map(self._segment, request.tokens.pieces)),
            prompt_tokens=total,
            cached_tokens=cached,
            encoded_tokens=0,
            computed_tokens=total - cached,
            reuse=request.reuse,
            ttft_ms=self._ttft_ms,
            prefill_ms=self._ttft_ms,
            generated_tokens=self._generated,
            fallback_reason=request.fallback_reason,
        )

    def _segment(self, piece: Piece) -> SegmentReport:
        """Name most of its tokens' source; the server says no more of what states cover."""
        source: Source = "computed"
        middle = (piece.start + piece.stop) // 2
        if piece.start < piece.stop and middle < self._cached:
            covered = any(run.start <= middle < run.end for run in self.request.runs)
            source = "remote" if covered else "prefix"
        segment = piece.segment
        return SegmentReport(
            segment.kind, segment.name, segment.text, piece.stop - piece.start, source
        )
