"""Forwards that several threads ask for at the same time, computed together.

Requests run in threads of their own and meet here. One that is alone computes its forward itself
and pays nothing. Where several wait, a thread that lives as long as any does leads: it takes what
waits, runs one forward over all of it and hands the results out. One thread, because every thread
that computes brings worker threads of its own, which wait by spinning.

Long prompts are read in parts. Where a part ends is decided by the batch alone, never by the clock
or by other requests: a matrix product over other rows may round differently, and an answer must not
depend on how busy the machine was.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pcache_core.errors import RequestCancelledError
from pcache_core.lm.batch import Batch

IsCancelled = Callable[[], bool]
"""Whether nobody waits for a result any longer."""

_FEW_TOKENS = 16
_MOST_BATCHES = 256
# How long a forward waits for those of the last one to come back with their next token.
_PATIENCE = 0.5  # of the last forward's time
_LONGEST_WAIT_S = 0.02


class _AskingThread(threading.local):
    """What a thread asks forwards for."""

    is_cancelled: IsCancelled | None = None


class _Job:
    """A batch that a thread waits for.

    parts: what of it is still to be computed. joins: whether they may share forwards.
    at_rest: whether no forward is at it right now.
    """

    __slots__ = ("at_rest", "error", "is_cancelled", "joins", "logits", "owner", "parts", "wake")

    def __init__(
        self, parts: Sequence[Batch], is_cancelled: IsCancelled | None, *, joins: bool
    ) -> None:
        self.parts = deque(parts)
        self.joins = joins
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

    compute: runs batches of different sequences; logits of each one's last token.
    joins: whether a batch may be cut and share a forward; one that may not runs whole and alone.
    part_tokens: prompts are read in parts of about so many tokens, see `Batch.parts`.

    A forward takes one step of every running answer, and beside them one part of a prompt, or of
    several where these fit. Prompts take turns: a long one holds up neither answers nor others.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Batch]], list[torch.Tensor]],
        joins: Callable[[Batch], bool],
        part_tokens: int,
    ) -> None:
        self._compute = compute
        self._joins = joins
        self._part_tokens = part_tokens
        self._thread = _AskingThread()
        self._waiting: list[_Job] = []  # in the order of their turns
        self._is_led = False
        self._arrived = threading.Condition()  # guards the lines around it
        self._expected: set[int] = set()  # owners of the last forward's finished batches
        self._patience_ends = 0.0

    def __len__(self) -> int:
        """Count the batches that somebody waits for, those at work included."""
        return len(self._waiting)

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
        joins = self._joins(batch)
        parts = batch.parts(self._part_tokens) if joins else [batch]
        job = _Job(parts, self._thread.is_cancelled, joins=joins)
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
            own.at_rest.wait()  # its buffers are about to serve somebody else

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
        jobs = self._next()
        try:
            self._forward(jobs)
        finally:
            for job in jobs:
                job.at_rest.set()
        return len(jobs)

    def _gather(self) -> None:
        """Wait a little for those who will have a next token to compute, to take them along."""
        with self._arrived:
            while not self._expected <= {job.owner for job in self._waiting}:
                left = self._patience_ends - time.perf_counter()
                if left <= 0 or not self._arrived.wait(left):
                    return

    def _next(self) -> list[_Job]:
        """Choose the jobs whose next parts the next forward computes."""
        with self._arrived:
            waiting = list(self._waiting)
        for job in waiting:
            if job.is_cancelled is not None and job.is_cancelled():
                self._finish(job, RequestCancelledError("the request was cancelled"))
        waiting = [job for job in waiting if not job.is_done]
        if not waiting:
            return []
        if not waiting[0].joins:
            return self._begun(waiting[:1])
        joining = [job for job in waiting if job.joins][:_MOST_BATCHES]
        chosen, room = [], self._part_tokens
        for job in joining:
            tokens = job.parts[0].num_tokens
            if tokens <= _FEW_TOKENS:
                chosen.append(job)
            elif tokens <= room or room == self._part_tokens:
                chosen.append(job)
                room -= tokens
        return self._begun(chosen)

    def _begun(self, jobs: Sequence[_Job]) -> list[_Job]:
        """Drop jobs that nobody waits for and mark the others as running."""
        with self._arrived:
            begun = [job for job in jobs if job in self._waiting]
            for job in begun:
                job.at_rest.clear()
            return begun

    def _forward(self, jobs: Sequence[_Job]) -> None:
        """Compute jobs' next parts together; where that fails, each alone, so that one fails."""
        if not jobs:
            return
        started = time.perf_counter()
        try:
            found = self._compute([job.parts[0] for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                self._finish(jobs[0], error)
            else:
                for job in jobs:
                    self._forward([job])
            return
        ended = time.perf_counter()
        finished = set()
        for job, logits in zip(jobs, found, strict=True):
            job.parts.popleft()
            if job.parts:
                self._line_up_again(job)
                continue
            self._finish(job, logits)
            finished.add(job.owner)
        self._expected = finished
        self._patience_ends = ended + min(_PATIENCE * (ended - started), _LONGEST_WAIT_S)

    def _line_up_again(self, job: _Job) -> None:
        """Let the others have their turns before the job's next part."""
        with self._arrived:
            if job in self._waiting:  # its thread may have left meanwhile
                self._waiting.remove(job)
                self._waiting.append(job)

    def _finish(self, job: _Job, result: torch.Tensor | Exception) -> None:
        with self._arrived:
            self._waiting = [other for other in self._waiting if other is not job]
        if isinstance(result, Exception):
            job.error = result
        else:
            job.logits = result
        job.wake.set()
