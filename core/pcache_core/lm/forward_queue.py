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

import _thread
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pcache_core.errors import RequestCancelledError
from pcache_core.lm.batch import Batch
from pcache_core.threads import Flag, renew_in_child

IsCancelled = Callable[[], bool]
"""Whether nobody waits for a result any longer."""

_FEW_TOKENS = 16
_MOST_BATCHES = 256
# How long a forward waits for those of the last one to come back with their next token.
_PATIENCE = 0.5  # of the last forward's time
_LONGEST_WAIT_S = 0.02
_LOOK_S = 0.05  # how often a waiting thread looks whether any thread leads


class _AskingThread(threading.local):
    """What a thread asks forwards for."""

    is_cancelled: IsCancelled | None = None


class _Leader:
    """A thread that computes forwards, until it has left."""

    __slots__ = ("has_left",)

    def __init__(self) -> None:
        self.has_left = False


class _Job(_Leader):
    """A batch that a thread waits for, or computes itself as long as it is the only one.

    parts: what of it is still to be computed. joins: whether they may share forwards.
    at_rest: whether no forward is at it right now.
    """

    __slots__ = ("at_rest", "error", "is_cancelled", "joins", "logits", "owner", "parts", "wake")

    def __init__(
        self, parts: Sequence[Batch], is_cancelled: IsCancelled | None, *, joins: bool
    ) -> None:
        super().__init__()
        self.parts = deque(parts)
        self.joins = joins
        self.is_cancelled = is_cancelled
        self.owner = threading.get_ident()
        self.wake = Flag()
        self.at_rest = Flag(is_set=True)
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

    compute: runs batches of different sequences; logits of each one's last tokens.
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
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Begin anew: in a forked child, nobody computes what its parent's threads wait for."""
        self._lock = threading.Lock()  # guards the lines around it
        self._waiting: list[_Job] = []  # in the order of their turns
        self._leader: _Leader | None = None
        self._arrived = Flag()
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
        """Logits of the batch's last tokens, [num_logits, vocab] fp32; its rows are filled.

        Raises: RequestCancelledError: nobody waits for it any longer, see `cancelled_by`.
        """
        joins = self._joins(batch)
        parts = batch.parts(self._part_tokens) if joins else [batch]
        job = _Job(parts, self._thread.is_cancelled, joins=joins)
        try:
            leads = self._line_up(job)
            while leads and not job.is_done:
                leads = self._compute_alone(job)
            while not job.is_done:
                if not job.wake.wait(_LOOK_S):
                    self._see_to_leader()
            return job.result()
        finally:
            job.has_left = True
            self._leave(job)

    def _line_up(self, job: _Job) -> bool:
        """Return whether the job's own thread is to compute it."""
        with self._lock:
            self._waiting.append(job)
            is_led = self._is_led
            leads = not is_led and not self._expects_others(job)
            if leads:
                self._leader = job
        self._arrived.set()
        if not leads and not is_led:
            self._start_leader()
        return leads

    def _compute_alone(self, job: _Job) -> bool:
        """Compute the job's next part, or give the lead away when others wait as well.

        An interrupt may land in the middle of this forward, so nobody else's batch is part of it.
        """
        with self._lock:
            if self._waiting == [job]:
                leads = True
            else:
                leads, self._leader = False, None
        if leads:
            self._turn([job])
        else:
            self._start_leader()
        return leads

    @property
    def _is_led(self) -> bool:
        return self._leader is not None and not self._leader.has_left

    def _expects_others(self, job: _Job) -> bool:
        """Return whether the last forward's other batches will be back in a moment."""
        return bool(self._expected - {job.owner}) and time.perf_counter() < self._patience_ends

    def _leave(self, own: _Job) -> None:
        """Let the others go on; also when an interrupt ended the waiting."""
        with self._lock:
            self._waiting = [job for job in self._waiting if job is not own]
        self._see_to_leader()
        if self._leader is not own:
            own.at_rest.wait()  # its buffers are about to serve somebody else

    def _see_to_leader(self) -> None:
        """Start a leader if jobs wait for one: an interrupt may have taken the last one away."""
        with self._lock:
            is_led = self._is_led or not self._waiting
        if not is_led:
            self._start_leader()

    def _start_leader(self) -> None:
        # `threading.Thread` waits for the new thread with an `Event`, which interrupts may break.
        _thread.start_new_thread(self._lead, ())

    def _lead(self) -> None:
        """Compute what waits until no more than one request is left."""
        own = _Leader()
        with self._lock:
            if self._is_led:
                return
            self._leader = own
        try:
            while not own.has_left:
                count = self._turn()
                with self._lock:
                    own.has_left = count <= 1 and not self._waiting
        except BaseException as error:  # a cancellation check of the caller's may raise anything
            with self._lock:
                own.has_left = True
                left, self._waiting = self._waiting, []
            for job in left:
                job.error = RuntimeError(f"computing a forward failed: {error!r}")
                job.error.__cause__ = error
                job.wake.set()

    def _turn(self, among: Sequence[_Job] | None = None) -> int:
        """Compute one forward of the jobs that wait, or of some; return of how many it was."""
        if among is None:
            self._gather()
        jobs = self._next(self._waiting if among is None else among)
        try:
            self._forward(jobs)
        finally:
            for job in jobs:
                job.at_rest.set()
        return len(jobs)

    def _gather(self) -> None:
        """Wait a little for those who will have a next token to compute, to take them along."""
        while True:
            self._arrived.clear()
            with self._lock:
                if self._expected <= {job.owner for job in self._waiting}:
                    return
            if not self._arrived.wait(self._patience_ends - time.perf_counter()):
                return

    def _next(self, among: Sequence[_Job]) -> list[_Job]:
        """Choose the jobs whose next parts the next forward computes."""
        waiting = [job for job in among if not job.has_left]
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
        with self._lock:
            self._waiting = [job for job in self._waiting if not job.has_left]
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
        with self._lock:
            if job in self._waiting:  # its thread may have left meanwhile
                self._waiting = [*(other for other in self._waiting if other is not job), job]

    def _finish(self, job: _Job, result: torch.Tensor | Exception) -> None:
        if isinstance(result, Exception):
            job.error = result
        else:
            job.logits = result
        with self._lock:
            self._waiting = [other for other in self._waiting if other is not job]
        job.wake.set()
