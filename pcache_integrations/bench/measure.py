"""Time to first token of the reuse modes beside a bare forward: checked, then timed in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from tempfile import TemporaryDirectory
from uuid import uuid4

import torch
from tqdm import tqdm

from pcache_core import (
    CausalLM,
    DiskStore,
    MemoryStore,
    ModuleStore,
    OptionError,
    Prompt,
    PromptCacheEngine,
    PromptCacheError,
    SamplingParams,
)
from pcache_core.evaluation.evaluate import environment
from pcache_core.lm import Batch
from pcache_core.params import ReuseMode
from pcache_core.prompt import TokenisedPrompt
from pcache_core.report import Report
from pcache_integrations.bench.results import (
    FLOOR,
    Benchmark,
    Order,
    Row,
    Sample,
    Samples,
    Way,
    rows_of,
)
from pcache_integrations.bench.workload import Round, Workload

_FIXED_TOKENS = 64  # the opening and what stands around the question, generously
_FEWEST_DOCUMENT_TOKENS = 16  # shorter ones may be computed in line
_SERVER_TTL_S = 3600
# Relative error, in the L2 norm, between logits of the same ids computed in other portions. In
# bfloat16, a random model with 24 layers is 0.04 away from itself in fp32; documents in another
# order move its logits by 1, another question by 0.2.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}

Engines = Mapping[ReuseMode, PromptCacheEngine]
"""One for each mode, over one store: none continues what another has just read."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure; checked when made.

    sizes: tokens of all documents of a prompt together. modes: `off` is measured in any case.
    tier: `memory`, `disk`, or a server's address.
    Raises: OptionError.
    """

    sizes: tuple[int, ...] = (1024, 2048, 4096)
    documents: int = 8
    question_tokens: int = 32
    answer_tokens: int = 16
    modes: tuple[ReuseMode, ...] = ("exact", "fast", "balanced")
    orders: tuple[Order, ...] = ("same", "new")
    tier: str = "memory"
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = min(self.sizes)
        if smallest < _FEWEST_DOCUMENT_TOKENS * self.documents:
            raise OptionError(
                f"--cached {smallest} makes {self.documents} documents of "
                f"{smallest // self.documents} tokens, the least is {_FEWEST_DOCUMENT_TOKENS}; "
                "take more tokens or fewer --documents"
            )
        if not (self.tier in ("memory", "disk") or "://" in self.tier):
            raise OptionError(
                f"unknown --tier {self.tier!r}; use memory, disk or redis://host:port"
            )

    @property
    def context_tokens(self) -> int:
        """The longest prompt and its answer."""
        return max(self.sizes) + self.question_tokens + self.answer_tokens + _FIXED_TOKENS


def measure(lm: CausalLM, options: BenchOptions, peers: Sequence[Way] = ()) -> Benchmark:
    """Measure every size; show a progress bar on standard error if that is a terminal.

    peers: more ways, which take turns with the reuse modes.
    Raises: OptionError: the model is not of a kind that can be measured, or its context is too
        short. PromptCacheError: what is to be timed computes something wrong.
    """
    _check_model(lm, options)
    rows: list[Row] = []
    notes: list[str] = []
    with tqdm(total=len(options.sizes) * options.rounds, unit="round", disable=None) as bar:
        for size in options.sizes:
            bar.set_description(f"{size} tokens")
            workload = Workload(
                lm,
                options.seed,
                documents=options.documents,
                document_tokens=size // options.documents,
                question_tokens=options.question_tokens,
            )
            with _engines(lm, options, size) as engines:
                engines["off"].encode(workload.documents, progress=False)
                prompts = workload.round()
                floor = Floor(lm, engines["off"].tokenise(prompts.same))
                notes += check_answers(engines, floor, prompts)
                ways = [*_own_ways(engines, floor, options), *peers]
                samples: Samples = {(way.name, order): [] for way in ways for order in way.orders}
                for number in range(options.rounds):
                    _ask_round(ways, workload.round(), number, samples)
                    bar.update()
            rows += rows_of(size, ways, samples)
    kind_of_store = options.tier.partition("://")[0]  # an address may hold a password
    return Benchmark(
        model=lm.name,
        parameters=lm.num_parameters,
        kv_bytes_per_token=lm.bytes_per_token,
        options=asdict(options) | {"tier": kind_of_store},
        environment=environment(lm),
        rows=tuple(rows),
        notes=tuple(dict.fromkeys(notes)),
    )


class Floor:
    """A bare forward of a prompt's last segment, the question: what no state can hold."""

    def __init__(self, lm: CausalLM, prompt: TokenisedPrompt) -> None:
        self._lm = lm
        self._ids = list(prompt.token_ids)
        self._start = prompt.pieces[-1].start
        self._buffers = lm.new_buffers(len(self._ids))
        self._forward(0)

    def ask(self, _: Prompt) -> Sample:
        """Time it; it is the same whatever the prompt: only the number of tokens counts."""
        started = time.perf_counter()
        self.logits().argmax().item()  # on an accelerator, waits until it is there
        return Sample((time.perf_counter() - started) * 1000, len(self._ids), self._start)

    def logits(self) -> torch.Tensor:
        """Compute the logits after the whole prompt, [vocab] fp32."""
        return self._forward(self._start)

    def _forward(self, first_row: int) -> torch.Tensor:
        rows = range(first_row, len(self._ids))
        return self._lm.forward(Batch.of_rows(self._buffers, self._ids[first_row:], rows, rows))


def check_answers(engines: Engines, floor: Floor, prompts: Round) -> list[str]:
    """Run every mode once; a repeated prefix and the floor must give the logits of `off`.

    Returns: which modes did not run as asked, and why.
    Raises: PromptCacheError: other logits.
    """
    off = engines["off"]
    reports = {
        mode: engine.prefill(prompts.first, reuse=mode).report
        for mode, engine in engines.items()
        if engine is not off
    }
    expected = off.prefill(prompts.same, reuse="off").logits
    found = {"a forward over keys and values in place": floor.logits()}
    if "exact" in engines:
        answer = engines["exact"].prefill(prompts.same, reuse="exact")
        found["exact over a repeated prefix"] = answer.logits
    limit = _TOLERANCE[off.lm.dtype]
    for what, logits in found.items():
        error = float((logits - expected).norm() / expected.norm())
        if not error <= limit:
            raise PromptCacheError(
                f"{what} gives other logits than off (relative error {error:.1e}, limit "
                f"{limit:.0e} in {off.lm.dtype}), so its time would mean nothing; "
                "please report it with the command that you ran"
            )
    return [
        f"{mode} fell back to {report.reuse}: {report.fallback_reason}"
        for mode, report in reports.items()
        if report.fallback_reason
    ]


def _ask_round(ways: Sequence[Way], prompts: Round, number: int, samples: Samples) -> None:
    """Ask every way once; who goes first changes from round to round."""
    turn = number % len(ways)
    for way in (*ways[turn:], *ways[:turn]):
        way.reset()
        first = way.ask(prompts.first)
        for order in way.orders:
            if order in ("same", "new"):
                prompt = prompts.same if order == "same" else prompts.new
                samples[way.name, order].append(way.ask(prompt))
            else:
                samples[way.name, order].append(first)


def _own_ways(engines: Engines, floor: Floor, options: BenchOptions) -> Iterator[Way]:
    for mode, engine in engines.items():
        orders: tuple[Order, ...] = ("cold",) if mode == "off" else options.orders
        yield Way(mode, "ours", orders, partial(_ask, engine, mode, options.answer_tokens))
    yield Way(FLOOR, "floor", ("floor",), floor.ask)


def _ask(engine: PromptCacheEngine, mode: ReuseMode, answer_tokens: int, prompt: Prompt) -> Sample:
    """Answer through `engine.stream`, as integrations do."""
    answered = 0
    arrivals: list[tuple[float, int]] = []
    report: Report | None = None
    # A token a forward, as other libraries decode, whatever the random words happen to repeat.
    params = SamplingParams(max_tokens=answer_tokens, speculative=False)
    for chunk in engine.stream(prompt, params, reuse=mode):
        answered += len(chunk.token_ids)
        arrivals.append((time.perf_counter(), answered))
        report = chunk.report
    assert report is not None, "the last chunk of a stream has the report"
    (first, before), (last, after) = arrivals[0], arrivals[-1]
    return Sample(
        report.ttft_ms,
        report.prompt_tokens,
        report.cached_tokens,
        decode_tokens_per_s=(after - before) / (last - first) if after > before else None,
    )


@contextmanager
def _engines(lm: CausalLM, options: BenchOptions, size: int) -> Iterator[Engines]:
    """Make engines over an empty store of the tier; what a server was given expires by itself."""
    with TemporaryDirectory(prefix="pcache-bench-") as folder:
        if options.tier == "memory":
            tokens = 2 * size + options.context_tokens
            store: ModuleStore = MemoryStore(budget_bytes=tokens * lm.bytes_per_token)
        elif options.tier == "disk":
            store = DiskStore(folder)
        else:
            from pcache_core.store.redis import RedisStore

            store = RedisStore(options.tier, ttl_s=_SERVER_TTL_S)
        namespace = f"bench-{uuid4().hex[:12]}"  # a server may hold states of others
        yield {
            mode: PromptCacheEngine(lm, store, namespace=namespace)
            for mode in ("off", *options.modes)
        }


def _check_model(lm: CausalLM, options: BenchOptions) -> None:
    if lm.support.kind == "no-cache":
        raise OptionError(
            f"{lm.name} keeps no keys and values per token ({lm.support.reason}), so there is "
            "nothing to reuse and no floor to measure; take another --model"
        )
    limit = lm.context_length
    if limit is not None and options.context_tokens > limit:
        raise OptionError(
            f"--cached {max(options.sizes)} with question and answer takes "
            f"{options.context_tokens} tokens, {lm.name} has a context of {limit}; take fewer"
        )
