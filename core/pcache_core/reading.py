"""Reading a prompt: its keys and values in a slot, and the logits to continue from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from pcache_core import assemble, prefill
from pcache_core.library import ModuleLibrary
from pcache_core.lm import Batch
from pcache_core.plan import Candidate, candidates
from pcache_core.report import Report
from pcache_core.request import Request
from pcache_core.sharing import StatesInUse
from pcache_core.slots import COMPUTED, Lease, SlotPool

_KEPT_SLOTS = 4
_MIN_LITERAL_TOKENS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A prompt that has been read: what to continue from.

    logits: [vocab], fp32. step: appends a token, returns the next logits. close: gives the slot
    back; called once, whatever happened.
    """

    logits: torch.Tensor
    report: Report
    step: Callable[[int], torch.Tensor]
    close: Callable[[], None]


class PromptReader:
    """Reads prompts over the states of a library and the slots of earlier requests."""

    def __init__(self, library: ModuleLibrary, min_module_tokens: int) -> None:
        self._lm = library.lm
        self._library = library
        self._min_module_tokens = min_module_tokens
        self._pool = SlotPool(self._lm.new_slot, _KEPT_SLOTS)
        self._in_use = StatesInUse()

    def read(self, request: Request) -> Reading:
        """Bring the prompt into a slot, compute what no state holds, repair what is asked for."""
        if self._lm.support.kind == "no-cache":
            return self._read_stock(request)
        clock = _Clock()
        wishes = assemble.wanted(request.tokens, self._candidates(request), self._library)
        with ExitStack() as undo:
            lease, lender = self._begin(request, wishes, undo)
            report, fillings = self._assemble(request, wishes, lease, lender, clock)
            todo = prefill.work(
                self._lm,
                lease,
                request.tokens,
                fillings,
                request.repair,
                reusable=assemble.module_tokens(wishes),
            )
            logits, attention = prefill.compute(self._lm, lease, todo)
            report.prefill_ms = clock.lap_ms()
            repaired = todo.repaired
            if todo.choices:
                logits, repaired = prefill.repair(self._lm, lease, todo, attention)
                report.repair_ms = clock.lap_ms()
            if request.repair and repaired:
                prefill.note_repair(lease, repaired, request.repair)
                assemble.describe_repair(report, request.tokens, repaired)
            close = undo.pop_all().close
        return Reading(logits, report, lambda token_id: self._step(lease, token_id), close)

    def _begin(
        self, request: Request, wishes: list[assemble.Wanted], undo: ExitStack
    ) -> tuple[Lease, StatesInUse | None]:
        """A slot, and who lends states where other requests use them; `undo` gives all back."""
        keys = {wish.keys[0] for wish in wishes}
        is_shared = self._in_use.enter(keys)
        undo.callback(self._in_use.leave, keys)
        lends = is_shared and self._lm.lends
        lease = self._acquire(request, wishes, lends=lends)
        undo.callback(self._release, lease, request)

        def forget(error: type[BaseException] | None, *_: object) -> None:
            if error is not None:  # in mid-work: nobody knows what its rows hold
                lease.shorten(0)

        undo.push(forget)
        return lease, self._in_use if lends else None

    def _assemble(
        self,
        request: Request,
        wishes: list[assemble.Wanted],
        lease: Lease,
        lender: StatesInUse | None,
        clock: _Clock,
    ) -> tuple[Report, Sequence[assemble.Filling]]:
        """Bring in what states hold of the prompt."""
        tokens, prefix = request.tokens, len(lease.token_ids)
        beyond = [wish for wish in wishes if wish.candidate.start >= prefix]
        loaded = assemble.load(tokens, beyond, self._library, lease, lender)
        report = assemble.describe(tokens, prefix, loaded, request.reuse)
        report.fallback_reason = request.fallback_reason
        report.load_ms = clock.lap_ms()
        lent = assemble.lend(lender, lease, tokens, loaded) if lender else frozenset()
        report.shared_tokens = sum(loan.state.num_tokens for loan in lease.slot.loans)
        lease.reserve(len(tokens.token_ids), self._lm.new_slot)
        assemble.fill(self._lm, lease, tokens, loaded, lent)
        report.assemble_ms = clock.lap_ms()
        return report, loaded.fillings

    @property
    def nbytes(self) -> int:
        """Keys and values that running requests hold, in bytes; shared ones once."""
        return self._pool.nbytes

    def _acquire(self, request: Request, wishes: list[assemble.Wanted], *, lends: bool) -> Lease:
        """A slot with as much of the prompt as an earlier request left."""
        # What is to be repaired starts from states, not from what earlier questions made of them.
        usable = [] if request.repair else wishes
        accepts = _accept_nothing if request.reuse == "off" else assemble.row_filter(usable)
        tokens = request.tokens
        # What is on loan needs no room; should it turn out not to be there, the slot grows.
        capacity = request.capacity - (assemble.module_tokens(wishes) if lends else 0)
        lease = self._pool.acquire(
            tokens.token_ids, accepts, capacity, request.repair, tokens.positions
        )
        assemble.keep_whole_modules(lease, wishes)
        is_in_opening = 0 < len(lease.token_ids) < tokens.opening
        openings = [wish.keys[0] for wish in wishes if wish.candidate.is_opening]
        if is_in_opening and any(map(self._library.contains, openings)):
            lease.shorten(0)  # a part of the opening would keep the state of all of it out
        return lease

    def _candidates(self, request: Request) -> list[Candidate]:
        if request.reuse in ("off", "exact"):
            return []
        found = candidates(
            request.tokens,
            min_module_tokens=self._min_module_tokens,
            min_literal_tokens=_MIN_LITERAL_TOKENS,
        )
        opening = request.tokens.opening
        return [c for c in found if self._library.can_encode(opening, c.passage, c.position)]

    def _read_stock(self, request: Request) -> Reading:
        """For models whose cache is not rows per token."""
        clock = _Clock()
        run = self._lm.stock_run()
        report = assemble.describe(request.tokens, 0, assemble.NOTHING, request.reuse)
        report.fallback_reason = request.fallback_reason
        logits = run(request.tokens.token_ids)
        report.prefill_ms = clock.lap_ms()
        return Reading(logits, report, step=lambda token_id: run([token_id]), close=lambda: None)

    def _step(self, lease: Lease, token_id: int) -> torch.Tensor:
        """Append a token and return the logits of the next."""
        token_ids, positions, first = [token_id], [lease.end], len(lease.token_ids)
        if positions[0] == self._lm.support.stable_length:
            # With this token every rotary frequency changes: no row fits any longer.
            token_ids, first = [*lease.token_ids, token_id], 0
            positions = [*lease.positions, lease.end]
        rows = range(first, first + len(token_ids))
        lease.reserve(rows.stop, self._lm.new_slot)
        logits = self._lm.forward(Batch.of_rows(lease.slot, token_ids, rows, positions))
        lease.append(token_ids[-1], positions[-1], COMPUTED)
        return logits

    def _release(self, lease: Lease, request: Request) -> None:
        """Give the slot back, empty if nothing in it may serve another request."""
        if request.reuse == "off" or self._lm.support.is_beyond_stable(lease.end):
            lease.shorten(0)
        self._pool.release(lease)


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        """Milliseconds since the last call."""
        before, self._last = self._last, time.perf_counter()
        return (self._last - before) * 1000


def _accept_nothing(row: int, label: str) -> bool:
    return False
