"""One length of prompts: everything is checked, then timed round by round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from uuid import uuid4

from pcache_core import CausalLM, ModuleStore, PromptCacheEngine
from pcache_integrations.bench.check import Engines, check_answers, warm_up
from pcache_integrations.bench.concurrency import ConcurrencyBench
from pcache_integrations.bench.encoding import EncodingBench
from pcache_integrations.bench.figures import (
    Concurrency,
    Encoding,
    Order,
    Row,
    Sample,
)
from pcache_integrations.bench.floor import Floor
from pcache_integrations.bench.growth import fill
from pcache_integrations.bench.options import BenchOptions
from pcache_integrations.bench.peers import Peer
from pcache_integrations.bench.summary import Samples, rows_of
from pcache_integrations.bench.ways import ModeWay, PeerWay, Way, floor_ways
from pcache_integrations.bench.workload import Round, Words, Workload

# Threads of numerical libraries spin for a while after their work, and would take time of the
# process that comes next.
_PAUSE_S = 0.3


@dataclass(frozen=True, slots=True)
class Found:
    """What was found at one size. fallbacks: modes that did not run as asked, and why."""

    rows: tuple[Row, ...]
    encoding: Encoding
    concurrency: Concurrency | None
    stored_bytes_per_token: float | None
    fallbacks: tuple[str, ...]


class OneSize:
    """Engines, stores and prompts for one number of cached tokens."""

    def __init__(
        self, lm: CausalLM, options: BenchOptions, peers: Sequence[Peer], cached_size: int
    ) -> None:
        self._lm = lm
        self._options = options
        self._peers = peers
        self._cached_size = cached_size
        self._namespace = f"bench-{uuid4().hex[:12]}"  # a server may hold states of others
        rng = random.Random(options.seed)
        self._workload = Workload(
            Words(lm, rng),
            rng,
            cached_tokens=cached_size,
            documents=options.documents,
            question_tokens=options.question_tokens,
        )

    def measure(self, progress: Callable[[], object]) -> Found:
        """All rounds; `progress` is called after each of them.

        Raises: WrongAnswerError: before anything is timed.
        """
        with ExitStack() as stack:
            store, encoder_store = (stack.enter_context(self._store()) for _ in range(2))
            engines: dict[str, PromptCacheEngine] = {
                name: self._engine(store) for name in ("off", *self._options.modes)
            }
            if self._options.store_states:
                name = f"fast, {self._options.store_states:,} other states"
                engines[name] = self._engine(stack.enter_context(self._filled_store()))
            stored = self._encode(engines)
            prompts = self._workload.round()
            fallbacks = warm_up(engines, prompts)
            floor = Floor(self._lm, engines["off"].tokenise(prompts.same))
            check_answers(engines, floor, prompts)
            ways = self._ways(engines, floor)
            encoding = EncodingBench(self._engine(encoder_store), self._workload)
            concurrency = self._concurrency(store)
            samples: Samples = {(way.name, order): [] for way in ways for order in way.orders}
            for number in range(self._options.rounds):
                self._round(ways, number, samples)
                encoding.run(number)
                if concurrency is not None:
                    concurrency.run(number)
                progress()
            return Found(
                rows=rows_of(self._cached_size, ways, samples),
                encoding=encoding.result(self._cached_size),
                concurrency=concurrency.result(self._cached_size) if concurrency else None,
                stored_bytes_per_token=stored,
                fallbacks=fallbacks,
            )

    def _round(self, ways: Sequence[Way], number: int, samples: Samples) -> None:
        """Every way once; who goes first changes from round to round."""
        prompts = self._workload.round()
        turn = number % len(ways)
        for way in (*ways[turn:], *ways[:turn]):
            for order, sample in ask_round(way, prompts).items():
                samples[way.name, order].append(sample)
            if self._peers:
                time.sleep(_PAUSE_S)

    def _ways(self, engines: Engines, floor: Floor) -> list[Way]:
        options = self._options
        ways: list[Way] = [ModeWay("off", engines["off"], options.answer_tokens, ("cold",))]
        for name, engine in engines.items():
            if name != "off":
                ways.append(ModeWay(name, engine, options.answer_tokens, options.orders))
        ways += floor_ways(floor)
        for peer in self._peers:
            ways.append(
                PeerWay(
                    peer,
                    lambda prompt: engines["off"].tokenise(prompt).token_ids,
                    options.answer_tokens,
                    ("cold", *options.orders),
                )
            )
        return ways

    def _concurrency(self, store: ModuleStore) -> ConcurrencyBench | None:
        options = self._options
        if not options.batch:
            return None
        engine = self._engine(store)
        return ConcurrencyBench(engine, self._workload, options.batch, options.answer_tokens)

    def _engine(self, store: ModuleStore) -> PromptCacheEngine:
        return PromptCacheEngine(self._lm, store, namespace=self._namespace)

    @contextmanager
    def _store(self) -> Iterator[ModuleStore]:
        tokens = 4 * self._cached_size + self._options.context_tokens + self._options.store_states
        with self._options.store(budget_bytes=tokens * self._lm.bytes_per_token) as store:
            yield store

    @contextmanager
    def _filled_store(self) -> Iterator[ModuleStore]:
        with self._store() as store:
            fill(store, self._lm, self._options.store_states, self._namespace)
            yield store

    def _encode(self, engines: Engines) -> float | None:
        """Encode all documents; returns bytes that a store keeps for a token, if it can tell."""
        first, *others = self._workload.documents
        bytes_per_token = []
        for engine in {id(engine.store): engine for engine in engines.values()}.values():
            engine.encode([first], progress=False)  # and the opening
            before = engine.store.stats().nbytes
            report = engine.encode(others, progress=False)
            after = engine.store.stats().nbytes
            if report.tokens and before is not None and after is not None:
                bytes_per_token.append((after - before) / report.tokens)
        return bytes_per_token[0] if bytes_per_token else None


def ask_round(way: Way, prompts: Round) -> dict[Order, Sample | None]:
    """Ask a round's prompts; the first is asked in any case, so that the others are not cold."""
    if way.kind == "floor":
        return {"floor": way.ask(prompts.first)}
    way.reset()
    asked: dict[Order, Sample | None] = {"cold": way.ask(prompts.first)}
    if "same" in way.orders:
        asked["same"] = way.ask(prompts.same)
    if "new" in way.orders:
        asked["new"] = way.ask(prompts.new)
    return {order: sample for order, sample in asked.items() if order in way.orders}
