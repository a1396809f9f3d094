"""Where the time goes: linear layers, attention, the rest of the model, and what is around it.

    python benchmarks/where.py --random llama-0.5b --cached 5000 --threads 2

A row is a step of an answer, a cold prompt, or one whose documents are known and in a new order.
The rest of the model is its small operations, transformers' Python and writing rows into buffers.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AttentionInterface

from pcache_core import CausalLM, Prompt, PromptCacheEngine, SamplingParams
from pcache_core.lm.attention import IMPLEMENTATION, slot_attention
from pcache_core.params import ReuseMode
from pcache_integrations.bench.measure import BenchOptions
from pcache_integrations.bench.models import load_model
from pcache_integrations.bench.workload import Workload

STEPS = 16
PLACES = ("linear layers", "attention", "rest of the model", "around the model")


class Stopwatch:
    """Adds up the seconds spent in a model's linear layers, in its attention and in all of it."""

    def __init__(self, lm: CausalLM) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._on_gpu = lm.device.type == "cuda"
        self._watch("model", lm.model)
        for module in lm.model.modules():
            if type(module).__name__.endswith("Linear"):
                self._watch("linear layers", module)
        AttentionInterface.register(IMPLEMENTATION, self._attention)

    def _watch(self, name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self._add(name, -1))
        module.register_forward_hook(lambda *_: self._add(name, 1))

    def _add(self, name: str, sign: int) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        self._seconds[name] += sign * time.perf_counter()

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        self._add("attention", -1)
        found = slot_attention(*args, **kwargs)
        self._add("attention", 1)
        return found

    def measure(self, work: Callable[[], object]) -> list[float]:
        """Do the work; return the milliseconds spent in each of `PLACES`."""
        self._seconds.clear()
        started = time.perf_counter()
        work()
        total = time.perf_counter() - started
        linear, attention, model = (self._seconds[n] for n in (*PLACES[:2], "model"))
        times = (linear, attention, model - linear - attention, total - model)
        return [1000 * seconds for seconds in times]


def main() -> None:
    options = BenchOptions()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a built-in model, a directory or a hub id")
    parser.add_argument("--random", help="a random model instead, such as llama-0.5b")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cached", type=int, default=5000, help="tokens of all documents")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = args.cached + options.context_tokens - max(options.sizes)
    lm = load_model(args.model, args.random, args.dtype, args.device, context_tokens=tokens, seed=0)
    shape = {"document_tokens": args.cached // 8, "question_tokens": options.question_tokens}
    workload = Workload(lm, 0, documents=8, **shape)
    engine, stopwatch = PromptCacheEngine(lm), Stopwatch(lm)
    engine.encode(workload.documents, progress=False)
    table = Table("ms", *PLACES, "all", box=None, title=f"{lm.name}, {args.cached:,} tokens")
    requests: dict[str, Callable[[], list[float]]] = {
        "a step": lambda: _step(engine, workload.round().new, stopwatch),
        "cold": lambda: _prefill(engine, workload.round().new, "off", stopwatch),
        "fast": lambda: _prefill(engine, workload.round().new, "fast", stopwatch),
        "balanced": lambda: _prefill(engine, workload.round().new, "balanced", stopwatch),
    }
    for name, measure in requests.items():
        rounds = [measure() for _ in range(args.rounds + 1)][1:]  # the first one warms up
        times = [median(column) for column in zip(*rounds, strict=True)]
        table.add_row(name, *(f"{ms:,.1f}" for ms in (*times, sum(times))))
    Console().print(table)


def _prefill(
    engine: PromptCacheEngine, prompt: Prompt, reuse: ReuseMode, stopwatch: Stopwatch
) -> list[float]:
    return stopwatch.measure(lambda: engine.prefill(prompt, reuse))


def _step(engine: PromptCacheEngine, prompt: Prompt, stopwatch: Stopwatch) -> list[float]:
    """Measure a step of an answer, the mean of several."""
    chunks = engine.stream(prompt, SamplingParams(max_tokens=STEPS + 1), "fast")
    next(chunks)
    times = stopwatch.measure(lambda: list(chunks))
    return [ms / STEPS for ms in times]


if __name__ == "__main__":
    main()
