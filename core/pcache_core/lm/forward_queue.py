"""Forwards that several threads ask for at the same time, computed together.

Requests run in threads of their own and meet here. One that is alone computes its forward itself
and pays nothing. Where several wait, a thread that lives as long as any does leads: it takes what
waits, runs one forward over all of it and hands the results out. One thread, because every thread
that computes brings worker threads of its own, which wait by spinning.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pcache_core.errors import RequestCancelledError
from pcache_core.lm.batch import Batch

IsCancelled = Callable[[], bool]
"""Whether nobody waits for a result any longer."""

_FEW_TOKENS = 16
_TOKENS_PER_FORWARD = 2048
# Beside steps of running answers, so that they go on while prompts are read: as many as take about
# this long, within limits.
_PAUSE_S = 0.25
_MOST_BESIDE_STEPS = 512
_LEAST_SHARE = 64
# Fewer tokens than this say nothing of the speed: reading the weights takes most of their time.
_FEWEST_TIMED = 256
_MOST_BATCHES = 256
# How long a forward waits for those of the last one to come back with their next token.
_PATIENCE = 0.5  # of the last forward's time
_LONGEST_WAIT_S = 0.02


class _Thread(threading.local):
    """What a thread asks forwards for."""

    is_cancelled: IsCancelled | None = None


class _Job:
    """A batch that a thread waits for.

    rest: what of it is still to be computed. at_rest: whether no forward is at it right now.
    """

    __slots__ = ("at_rest", "error", "is_cancelled", "logits", "owner", "rest", "wake")

    def __init__(self, batch: Batch, is_cancelled: IsCancelled | None) -> None:
        self.rest: Batch = batch
        self.is_cancelled = is_cancelled
        self.owner = threading.get_ident()
        self.wake = threading.Event()
        self.at_rest = threading.Event()
        self.at_rest.set()
        self.logits: torch.Tensor | None = None
        self.error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.logits is not None or self.error is not None

    def result(self) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        assert self.logits is not None
        return self.logits


class ForwardQueue:
    """Computes batches in the order they come, those that wait at the same time in one forward.

    compute: runs batches of different slots; logits of each one's last token.
    joins: whether a batch may be cut and share a forward; one that may not runs whole and alone.

    A forward takes one step of every running answer, and beside them a limited number of prompt
    tokens, in equal shares: a long prompt holds up neither answers nor short prompts.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Batch]], list[torch.Tensor]],
        joins: Callable[[Batch], bool],
    ) -> None:
        self._compute = compute
        self._joins = joins
        self._thread = _Thread()
        self._waiting: list[_Job] = []  # in the order they came
        self._is_led = False
        self._arrived = threading.Condition()  # guards the lines around it
        self._expected: set[int] = set()  # owners of the last forward's finished batches
        self._patience_ends = 0.0
        self._tokens_per_s = float("inf")  # in the last forward that read prompts

    @contextmanager
    def cancelled_by(self, is_cancelled: IsCancelled) -> Iterator[None]:
        """Inside, this thread's batches are given up when `is_cancelled` says so, or did before."""
        before = self._thread.is_cancelled
        self._thread.is_cancelled = is_cancelled
        if before is not None:
            outer = before
            self._thread.is_cancelled = lambda: outer() or is_cancelled()
        try:
            yield
        finally:
            self._thread.is_cancelled = before

    def check_cancelled(self) -> None:
        """Raises: RequestCancelledError: nobody waits for this thread's results any longer."""
        if self._thread.is_cancelled is not None and self._thread.is_cancelled():
            raise RequestCancelledError("the request was cancelled")

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits of the batch's last token, [vocab] fp32; its rows are filled.

        Raises: RequestCancelledError: nobody waits for it any longer, see `cancelled_by`.
        """
        job = _Job(batch, self._thread.is_cancelled)
        with self._arrived:
            self._waiting.append(job)
            self._arrived.notify()
            leads = not self._is_led and not self._expects_others(job)
            if leads or not self._is_led:
                self._is_led = True
                if not leads:
                    self._start_leader()
        try:
            while leads and not job.is_done:
                self._turn()
            job.wake.wait()
        finally:
            self._leave(job, leads=leads)
        return job.result()

    def _expects_others(self, job: _Job) -> bool:
        """Whether the last forward's other batches will be back in a moment."""
        return bool(self._expected - {job.owner}) and time.perf_counter() < self._patience_ends

    def _leave(self, own: _Job, *, leads: bool) -> None:
        """Let the others go on; also when an interrupt ended the waiting."""
        with self._arrived:
            self._waiting = [job for job in self._waiting if job is not own]
            if leads:
                self._is_led = bool(self._waiting)
                if self._is_led:
                    self._start_leader()
        if not leads:
            own.at_rest.wait()  # its slot is about to serve somebody else

    def _start_leader(self) -> None:
        threading.Thread(target=self._lead, name="pcache-forwards", daemon=True).start()

    def _lead(self) -> None:
        """Compute what waits until no more than one request is left."""
        try:
            while True:
                count = self._turn()
                with self._arrived:
                    if count <= 1 and not self._waiting:
                        self._is_led = False
                        return
        except BaseException as error:  # a cancellation check of the caller's may raise anything
            with self._arrived:
                self._is_led = False
                left, self._waiting = self._waiting, []
            for job in left:
                job.error = RuntimeError(f"computing a forward failed: {error!r}")
                job.wake.set()
            raise

    def _turn(self) -> int:
        """One forward; how many batches it was about."""
        self._gather()
        parts = self._next()
        try:
            self._forward(parts)
        finally:
            for job, _ in parts:
                job.at_rest.set()
        return len(parts)

    def _gather(self) -> None:
        """Wait a little for those who will have a next token to compute, to take them along."""
        with self._arrived:
            while not self._expected <= {job.owner for job in self._waiting}:
                left = self._patience_ends - time.perf_counter()
                if left <= 0 or not self._arrived.wait(left):
                    return

    def _next(self) -> list[tuple[_Job, Batch]]:
        """What the next forward computes: jobs and the part of each."""
        with self._arrived:
            waiting = list(self._waiting)
        for job in waiting:
            if job.is_cancelled is not None and job.is_cancelled():
                self._finish(job, RequestCancelledError("the request was cancelled"))
        waiting = [job for job in waiting if not job.is_done]
        if not waiting:
            return []
        first = waiting[0]
        if not self._joins(first.rest):
            return self._begun([(first, first.rest)])
        joining = [job for job in waiting if self._joins(job.rest)][:_MOST_BATCHES]
        steps = [job for job in joining if job.rest.num_tokens <= _FEW_TOKENS]
        others = [job for job in joining if job.rest.num_tokens > _FEW_TOKENS]
        # Those of the last forward who aren't back yet will be, so it is not made long meanwhile.
        is_shared = steps or self._expected
        budget = self._tokens_beside_steps if is_shared else _TOKENS_PER_FORWARD
        shares = _shares([job.rest.num_tokens for job in others], budget)
        parts = zip(others, shares, strict=True)
        heads = [(job, _head(job.rest, share)) for job, share in parts if share]
        return self._begun([(job, job.rest) for job in steps] + heads)

    @property
    def _tokens_beside_steps(self) -> int:
        in_time = min(_PAUSE_S * self._tokens_per_s, _MOST_BESIDE_STEPS)
        return max(int(in_time), _LEAST_SHARE)

    def _begun(self, parts: Sequence[tuple[_Job, Batch]]) -> list[tuple[_Job, Batch]]:
        """Those that are still waited for; from now on a forward is at them."""
        with self._arrived:
            begun = [part for part in parts if part[0] in self._waiting]
            for job, _ in begun:
                job.at_rest.clear()
            return begun

    def _forward(self, parts: Sequence[tuple[_Job, Batch]]) -> None:
        """Compute parts together; where that fails, each by itself, so that one fails alone."""
        if not parts:
            return
        started = time.perf_counter()
        try:
            found = self._compute([batch for _, batch in parts])
        except Exception as error:
            if len(parts) == 1:
                self._finish(parts[0][0], error)
            else:
                for part in parts:
                    self._forward([part])
            return
        ended = time.perf_counter()
        tokens = sum(batch.num_tokens for _, batch in parts)
        if tokens >= _FEWEST_TIMED:
            self._tokens_per_s = tokens / max(ended - started, 1e-9)
        finished = set()
        for (job, batch), logits in zip(parts, found, strict=True):
            if batch.num_tokens < job.rest.num_tokens:
                job.rest = job.rest.split(batch.num_tokens)[1]
                continue
            self._finish(job, logits)
            finished.add(job.owner)
        self._expected = finished
        self._patience_ends = ended + min(_PATIENCE * (ended - started), _LONGEST_WAIT_S)

    def _finish(self, job: _Job, result: torch.Tensor | Exception) -> None:
        with self._arrived:
            self._waiting = [other for other in self._waiting if other is not job]
        if isinstance(result, Exception):
            job.error = result
        else:
            job.logits = result
        job.wake.set()


def _head(batch: Batch, tokens: int) -> Batch:
    """The batch's first tokens; itself if these are all."""
    return batch if tokens >= batch.num_tokens else batch.split(tokens)[0]


def _shares(sizes: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each to compute: in equal shares, what small ones leave to the others.

    In the order they came, so that those whom the budget doesn't reach get 0 this time.
    """
    reached = sizes[: max(1, budget // _LEAST_SHARE)]
    shares = [0] * len(sizes)
    left = budget
    smallest_first = sorted(range(len(reached)), key=lambda index: sizes[index])
    for rank, index in enumerate(smallest_first):
        shares[index] = min(sizes[index], max(left, 0) // (len(reached) - rank))
        left -= shares[index]
    return shares
