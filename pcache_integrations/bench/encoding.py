"""Tokens per second of `engine.encode`, beside the model's own padded forward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from pcache_core import CausalLM, PromptCacheEngine
from pcache_integrations.bench.figures import Encoding, Spread
from pcache_integrations.bench.workload import Workload

_BATCHES = (1, 4, 16)


class EncodingBench:
    """Encodes fresh documents round by round, and reads the same ones by plain forwards.

    The warm-up tries several numbers of documents in a forward; the fastest is used from then on.
    """

    def __init__(self, engine: PromptCacheEngine, workload: Workload) -> None:
        self._engine = engine
        self._workload = workload
        self._encode: list[float] = []
        self._forward: list[float] = []
        documents = self._documents()
        engine.encode(documents, progress=False)
        batches = {min(batch, len(documents)) for batch in _BATCHES}
        speeds = {batch: forward_speed(engine.lm, documents, batch) for batch in batches}
        self._batch = max(speeds, key=lambda batch: speeds[batch])
        engine.forget(documents)

    def run(self, number: int) -> None:
        """One round; who goes first changes from round to round."""
        documents = self._documents()
        for turn in (number, number + 1):
            if turn % 2:
                self._forward.append(forward_speed(self._engine.lm, documents, self._batch))
            else:
                report = self._engine.encode(documents, progress=False)
                self._encode.append(report.tokens_per_second)
        self._engine.forget(documents)

    def result(self, cached_size: int) -> Encoding:
        """Over all rounds so far."""
        ratios = [ours / theirs for ours, theirs in zip(self._encode, self._forward, strict=True)]
        return Encoding(
            cached_size=cached_size,
            tokens_per_s=Spread.of(self._encode),
            forward_tokens_per_s=Spread.of(self._forward),
            forward_batch=self._batch,
            share=median(ratios),
        )

    def _documents(self) -> list[str]:
        return self._workload.fresh_documents(len(self._workload.documents))


@torch.no_grad()
def forward_speed(lm: CausalLM, texts: Sequence[str], batch: int) -> float:
    """Tokens/s of the unmodified model over padded batches, with its own attention."""
    ids = sorted((lm.token_ids(text) for text in texts), key=len)
    started = time.perf_counter()
    for first in range(0, len(ids), batch):
        part = ids[first : first + batch]
        longest = max(map(len, part))
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part])
        output = lm.model(
            input_ids=padded.to(lm.device),
            attention_mask=mask.to(lm.device),
            use_cache=True,
            logits_to_keep=1,
        )
        output.logits.argmax().item()  # on an accelerator, waits until it is there
    return sum(map(len, ids)) / (time.perf_counter() - started)
