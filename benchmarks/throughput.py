"""Tokens per second: encoding ahead, and requests over the same documents at once.

    python benchmarks/throughput.py --random llama-0.5b --cached 2400 --question-tokens 16 \\
        --answer-tokens 32 --requests 16 --rounds 2 --threads 2

Encoding is measured beside the model's own padded forward over as many documents, with its own
attention and in the batches that suit it best; requests at once beside the same number one after
another. Who goes first changes from round to round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch

from pcache_core import CausalLM, Prompt, PromptCacheEngine, PromptCacheError, SamplingParams
from pcache_integrations.bench.measure import BenchOptions
from pcache_integrations.bench.models import load_model
from pcache_integrations.bench.workload import Workload

BATCHES = (1, 4, 16)


def measure_encoding(engine: PromptCacheEngine, workload: Workload, rounds: int) -> str:
    """Encode fresh documents in every round, and read as many by plain forwards."""
    count = len(workload.documents)
    documents = workload.fresh_documents(count)
    engine.encode(documents, progress=False)
    batch = max(BATCHES, key=lambda size: forward_speed(engine.lm, documents, size))
    ours, theirs = [], []
    for number in range(rounds):
        documents = workload.fresh_documents(count)
        for turn in (number, number + 1):
            if turn % 2:
                theirs.append(forward_speed(engine.lm, documents, batch))
            else:
                report = engine.encode(documents, progress=False)
                ours.append(report.tokens_per_second)
    share = median(one / other for one, other in zip(ours, theirs, strict=True))
    return (
        f"encoding ahead: {median(ours):,.0f} tokens/s, {share:.0%} of the model's best plain "
        f"forward ({median(theirs):,.0f} tokens/s, {min(batch, count)} documents padded to one "
        "length)"
    )


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


class Requests:
    """Requests in `fast` over the same documents, each in an order of its own."""

    def __init__(self, engine: PromptCacheEngine, workload: Workload, answer_tokens: int) -> None:
        self._engine = engine
        self._workload = workload
        self._params = SamplingParams(max_tokens=answer_tokens, speculative=False)
        self._kv_bytes = 0
        self._rows = 0

    def measure(self, count: int, rounds: int) -> str:
        self._engine.encode(self._workload.documents, progress=False)
        self._speed(count, count)
        speeds: dict[int, list[float]] = {1: [], count: []}
        for number in range(rounds):
            for at_once in (1, count) if number % 2 else (count, 1):
                speeds[at_once].append(self._speed(count, at_once))
        alone, together = speeds.values()
        faster = median(many / one for one, many in zip(alone, together, strict=True))
        share = self._kv_bytes / (self._rows * self._engine.lm.bytes_per_token)
        return (
            f"{count} requests in fast: {median(alone):.1f} tokens/s one after another, "
            f"{median(together):.1f} at once, {faster:.1f} times as many; keys and values take "
            f"{self._kv_bytes / 1e6:,.0f} MB at most, {share:.0%} of separate copies"
        )

    def _speed(self, count: int, at_once: int) -> float:
        prompts = [self._workload.round().new for _ in range(count)]
        started = time.perf_counter()
        with ThreadPoolExecutor(at_once) as threads:
            lengths = list(threads.map(self._answer, prompts))
        elapsed = time.perf_counter() - started
        self._rows = sum(prompt_tokens + answered for prompt_tokens, answered in lengths)
        return sum(answered for _, answered in lengths) / elapsed

    def _answer(self, prompt: Prompt) -> tuple[int, int]:
        """Count the prompt's and the answer's tokens; note what all requests hold meanwhile."""
        answered, prompt_tokens = 0, 0
        for chunk in self._engine.stream(prompt, self._params, reuse="fast"):
            answered += len(chunk.token_ids)
            self._kv_bytes = max(self._kv_bytes, self._engine.kv_bytes())
            if chunk.report is not None:
                prompt_tokens = chunk.report.prompt_tokens
        return prompt_tokens, answered


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    known = BenchOptions()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a built-in model, a directory or a hub id")
    parser.add_argument("--random", help="a random model instead, such as llama-0.5b")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cached", type=int, default=2400, help="tokens of all documents")
    for name in ("documents", "question_tokens", "answer_tokens", "rounds", "seed"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(known, name))
    parser.add_argument("--requests", type=int, default=16, help="at once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)
    shape = {name: getattr(args, name) for name in ("documents", "question_tokens")}
    options = BenchOptions((args.cached,), answer_tokens=args.answer_tokens, **shape)
    torch.set_num_threads(args.threads)
    lm = load_model(
        args.model,
        args.random,
        args.dtype,
        args.device,
        context_tokens=options.context_tokens,
        seed=args.seed,
    )
    size = args.cached // args.documents
    workload = Workload(lm, args.seed, document_tokens=size, **shape)
    print(f"{lm.name}, {args.cached:,} tokens of documents, {lm.dtype}, {args.threads} threads")
    print(measure_encoding(PromptCacheEngine(lm), workload, args.rounds))
    requests = Requests(PromptCacheEngine(lm), workload, args.answer_tokens)
    print(requests.measure(args.requests, args.rounds))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PromptCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
