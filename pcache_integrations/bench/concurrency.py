"""Requests over the same documents at once, beside the same requests one after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from pcache_core import Prompt, PromptCacheEngine, SamplingParams
from pcache_integrations.bench.figures import Concurrency, Spread
from pcache_integrations.bench.workload import Workload


class ConcurrencyBench:
    """Asks `requests` prompts, each with the documents in an order of its own, in `fast`."""

    def __init__(
        self,
        engine: PromptCacheEngine,
        workload: Workload,
        requests: int,
        answer_tokens: int,
    ) -> None:
        self._engine = engine
        self._workload = workload
        self._requests = requests
        self._params = SamplingParams(max_tokens=answer_tokens)
        self._speeds: dict[int, list[float]] = {1: [], requests: []}
        self._kv_bytes = 0
        self._separate_kv_bytes = 0
        self._tokens_per_second(workload.prompts(requests), requests)

    def run(self, number: int) -> None:
        """One round; which goes first changes from round to round."""
        turns = list(self._speeds)
        for at_once in turns if number % 2 else turns[::-1]:
            prompts = self._workload.prompts(self._requests)
            self._speeds[at_once].append(self._tokens_per_second(prompts, at_once))

    def result(self, cached_size: int) -> Concurrency:
        """Over all rounds so far."""
        alone, at_once = self._speeds.values()
        ratios = [many / one for one, many in zip(alone, at_once, strict=True)]
        return Concurrency(
            cached_size=cached_size,
            requests=self._requests,
            alone_tokens_per_s=Spread.of(alone),
            at_once_tokens_per_s=Spread.of(at_once),
            speedup=median(ratios),
            kv_bytes=self._kv_bytes,
            separate_kv_bytes=self._separate_kv_bytes,
        )

    def _tokens_per_second(self, prompts: Sequence[Prompt], at_once: int) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(at_once) as threads:
            lengths = list(threads.map(self._answer, prompts))
        elapsed = time.perf_counter() - started
        rows = sum(prompt_tokens + answered for prompt_tokens, answered in lengths)
        self._separate_kv_bytes = rows * self._engine.lm.bytes_per_token
        return sum(answered for _, answered in lengths) / elapsed

    def _answer(self, prompt: Prompt) -> tuple[int, int]:
        """Tokens of the prompt and of the answer; notes what all requests hold meanwhile."""
        answered, prompt_tokens = 0, 0
        for chunk in self._engine.stream(prompt, self._params, reuse="fast"):
            answered += len(chunk.token_ids)
            self._kv_bytes = max(self._kv_bytes, self._engine.kv_bytes())
            if chunk.report is not None:
                prompt_tokens = chunk.report.prompt_tokens
        return prompt_tokens, answered
