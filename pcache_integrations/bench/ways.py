"""Who is asked: the reuse modes, each in an engine of its own, the floor, and the peers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from pcache_core import Prompt, PromptCacheEngine, SamplingParams
from pcache_core.report import Report
from pcache_integrations.bench.check import mode_of
from pcache_integrations.bench.figures import Kind, Order, Sample
from pcache_integrations.bench.floor import Floor
from pcache_integrations.bench.peers import Peer, PeerError

NO_CACHE_FLOOR = "forward, no K/V"
FLOOR = "forward, K/V in place"


class Way(Protocol):
    """Something that answers prompts.

    orders: which of a round's prompts it is timed on; the first one of a round it is always asked
    where others follow, so that it knows the documents in that order.
    """

    name: str
    kind: Kind
    orders: tuple[Order, ...]

    def ask(self, prompt: Prompt) -> Sample | None:
        """Answer; None where it can't any more."""

    def reset(self) -> None:
        """Forget what earlier prompts left, where the first prompt of a round is timed."""


class ModeWay:
    """A reuse mode. Its engine keeps the buffers of its own requests alone."""

    kind: Kind = "ours"

    def __init__(
        self, name: str, engine: PromptCacheEngine, answer_tokens: int, orders: tuple[Order, ...]
    ) -> None:
        self.name = name
        self.orders = orders
        self._engine = engine
        self._mode = mode_of(name)
        self._params = SamplingParams(max_tokens=answer_tokens)

    def ask(self, prompt: Prompt) -> Sample:
        """Through `engine.stream`, as integrations do."""
        tokens: list[int] = []
        arrivals: list[tuple[float, int]] = []
        report: Report | None = None
        for chunk in self._engine.stream(prompt, self._params, reuse=self._mode):
            tokens += chunk.token_ids
            arrivals.append((time.perf_counter(), len(tokens)))
            report = chunk.report
        assert report is not None, "the last chunk of a stream has the report"
        (first, before), (last, after) = arrivals[0], arrivals[-1]
        return Sample(
            ttft_ms=report.ttft_ms,
            prompt_tokens=report.prompt_tokens,
            cached_tokens=report.cached_tokens,
            first_token=tokens[0] if tokens else -1,
            decode_tokens_per_s=(after - before) / (last - first) if after > before else None,
            parts_ms=parts_ms(report),
        )

    def reset(self) -> None:
        """Its prompts never start like one of its recent ones, so there is nothing to forget."""


def parts_ms(report: Report) -> dict[str, float]:
    """Where the time to first token went."""
    parts = {
        "look up and load": report.load_ms,
        "copy and rotate": report.assemble_ms,
        "forward": report.prefill_ms,
        "repair": report.repair_ms,
    }
    return {**parts, "other": max(0.0, report.ttft_ms - sum(parts.values()))}


class FloorWay:
    """One bare forward of the question's tokens."""

    kind: Kind = "floor"
    orders: tuple[Order, ...] = ("floor",)

    def __init__(self, name: str, forward: Callable[[], float], floor: Floor) -> None:
        self.name = name
        self._forward = forward
        self._floor = floor

    def ask(self, prompt: Prompt) -> Sample:
        """The same forward whatever the prompt: only the number of tokens counts."""
        cached = self._floor.cached_tokens if self.name == FLOOR else 0
        return Sample(self._forward(), self._floor.prompt_tokens, cached)

    def reset(self) -> None:
        """Nothing is kept."""


def floor_ways(floor: Floor) -> list[Way]:
    """With the documents' keys and values in place, and with none at all."""
    return [
        FloorWay(FLOOR, floor.in_place_ms, floor),
        FloorWay(NO_CACHE_FLOOR, floor.alone_ms, floor),
    ]


class PeerWay:
    """Another library, in a process of its own."""

    kind: Kind = "peer"

    def __init__(
        self,
        peer: Peer,
        tokenise: Callable[[Prompt], tuple[int, ...]],
        answer_tokens: int,
        orders: tuple[Order, ...],
    ) -> None:
        self.name = peer.spec.label
        self.orders = orders if peer.spec.keeps_prefix else ("cold",)
        self._peer = peer
        self._tokenise = tokenise
        self._answer_tokens = answer_tokens

    def ask(self, prompt: Prompt) -> Sample | None:
        """None from the first failure on; the peer notes what it was."""
        if self._peer.problem is not None:
            return None
        try:
            return self._peer.run(self._tokenise(prompt), prompt.text, self._answer_tokens)
        except PeerError as error:
            self._peer.give_up(str(error))
            return None

    def reset(self) -> None:
        """Forget every earlier prompt."""
        if self._peer.problem is None:
            try:
                self._peer.reset()
            except PeerError as error:
                self._peer.give_up(str(error))
