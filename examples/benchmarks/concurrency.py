"""Answers to many requests at once and one after another, in one process.

A random Llama of about half a billion parameters answers questions over the same documents, each in
an order of its own; all documents are encoded before. Requests that run at the same time share
forwards.

    python examples/benchmarks/concurrency.py --threads 2
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging
from ttft import OPENING, random_llama, words

from pcache_core import CausalLM, Prompt, PromptCacheEngine, SamplingParams, Segment
from pcache_core.lm.loading import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--document-tokens", type=int, default=100)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(resolve("builtin:tiny-rag")))
    engine = PromptCacheEngine(
        CausalLM(random_llama(torch.bfloat16), tokenizer, name="random Llama"), reuse="fast"
    )
    rng = random.Random(0)
    documents = [words(tokenizer, rng, args.document_tokens) for _ in range(args.documents)]
    engine.encode(documents, anchor=OPENING)
    params = SamplingParams(max_tokens=args.answer_tokens)

    def prompt() -> Prompt:
        shuffled = [Segment(text, "document") for text in rng.sample(documents, len(documents))]
        question = f"\n\nQuestion:{words(tokenizer, rng, 16)}\nAnswer:"
        return Prompt([Segment(OPENING, "literal"), *shuffled, Segment(question, "argument")])

    def tokens_per_second(at_once: int) -> float:
        prompts = [prompt() for _ in range(args.requests)]
        started = time.perf_counter()
        with ThreadPoolExecutor(at_once) as threads:
            answers = list(threads.map(lambda p: engine.generate(p, params), prompts))
        seconds = time.perf_counter() - started
        return sum(len(answer.token_ids) for answer in answers) / seconds

    speeds: dict[int, list[float]] = {1: [], args.requests: []}
    for round_number in range(args.rounds + 1):  # the first round warms up and does not count
        for at_once, found in speeds.items():
            speed = tokens_per_second(at_once)
            if round_number:
                found.append(speed)
                print(f"{at_once:3} at once: {speed:7.1f} tokens/s")
    alone, together = (median(found) for found in speeds.values())
    print(
        f"{args.requests} requests: {alone:.1f} tokens/s one after another, {together:.1f} at "
        f"once, {together / alone:.1f}x"
    )


if __name__ == "__main__":
    main()
