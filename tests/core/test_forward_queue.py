"""Forwards that several threads ask for: together, in parts, fairly, and given up when unwanted.

The oracle is a plain transformers forward of an unmodified copy of the model.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

import tiny_models
from pcache_core import CausalLM
from pcache_core.errors import RequestCancelledError
from pcache_core.lm import Batch, Span
from pcache_core.lm.forward_queue import ForwardQueue

TOLERANCE = 1e-4
PART = 512


@pytest.fixture
def lm(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama", seed=3)


def ids(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.VOCAB_SIZE, (count,), generator=generator).tolist()


def plain(name: str, token_ids: Sequence[int], seed: int = 3) -> torch.Tensor:
    model = tiny_models.build(name, seed=seed)
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)])).logits[0, -1]


def whole(lm: CausalLM, token_ids: Sequence[int]) -> Batch:
    rows = range(len(token_ids))
    return Batch.of_rows(lm.new_buffers(len(token_ids) + 8), token_ids, rows, rows)


class Recorded:
    """A real model's computing, which notes what it was asked for and may be held up or fail."""

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        self.sizes: list[list[int]] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.refused_length = 0

    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        self.may_go.wait()
        self.sizes.append([batch.num_tokens for batch in batches])
        if any(batch.num_tokens == self.refused_length for batch in batches):
            raise MemoryError("no memory for this one")
        assert self.lm.support.forward is not None
        return self.lm.support.forward(batches)


def joins(batch: Batch) -> bool:
    return True


def wait_until(is_true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.001)


class Threads:
    """Runs calls in threads of their own, started one after another; results in order."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self.results: dict[int, object] = {}

    def start(self, call: Callable[[], object]) -> None:
        index = len(self._threads)

        def work() -> None:
            try:
                self.results[index] = call()
            except Exception as error:
                self.results[index] = error

        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()

    def __len__(self) -> int:
        return len(self._threads)

    def join(self) -> list[object]:
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        return [self.results[index] for index in range(len(self._threads))]


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gemma3", "gpt_oss", "mixtral", "gpt_neox", "gpt2", "deepseek_v3"]
)
def test_requests_in_one_forward_get_the_logits_of_a_plain_forward(
    tiny_lm: Callable[..., CausalLM], name: str
) -> None:
    lm = tiny_lm(name, seed=3)
    assert lm.support.forward is not None
    # Latent attention expands the cache before it attends: one request at a time.
    assert lm.support.forward.merges == (name != "deepseek_v3")
    texts = [ids(1, 40), ids(2, 7), ids(3, 19)]
    running = whole(lm, texts[0][:-4])
    lm.forward(running)
    last = range(len(texts[0]) - 4, len(texts[0]))
    step = Batch.of_rows(running.buffers, texts[0][-4:], last, last, num_logits=3)
    found = lm.support.forward([step, whole(lm, texts[1]), whole(lm, texts[2])])
    expected = [[texts[0][:-2], texts[0][:-1], texts[0]], texts[1:2], texts[2:]]
    for logits, each in zip(found, expected, strict=True):
        rows = torch.stack([plain(name, token_ids) for token_ids in each])
        assert logits.shape == rows.shape
        assert (logits - rows).abs().max() < TOLERANCE


@pytest.mark.parametrize("most", [64, 128])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_batch_in_parts_gives_the_logits_and_attention_of_the_whole(
    tiny_lm: Callable[..., CausalLM], name: str, most: int
) -> None:
    lm = tiny_lm(name, seed=3)
    count = 200
    token_ids, rows = ids(4, count), range(count)
    # In two parts, for two sums.
    watched = {count - 70: (1.0, 0.0), count - 65: (-0.5, 1.0), count - 1: (2.0, 0.0)}
    at_once = Batch.of_rows(lm.new_buffers(count), token_ids, rows, rows, watched)
    lm.forward(at_once)
    in_parts = Batch.of_rows(lm.new_buffers(count), token_ids, rows, rows, watched)
    parts = in_parts.parts(most)
    assert len(parts) > 1
    for part in parts:
        logits = lm.forward(part)
    assert (logits - plain(name, token_ids)).abs().max() < TOLERANCE
    torch.testing.assert_close(in_parts.attention, at_once.attention)
    assert float(in_parts.attention.sum()) > 1


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1, [1]),
        (512, [512]),
        (575, [575]),  # 63 tokens are no part of their own
        (576, [512, 64]),
        (900, [512, 388]),
        (1087, [512, 575]),
        (1300, [512, 512, 276]),
    ],
)
def test_a_prompt_is_cut_at_multiples_from_its_first_token(
    lm: CausalLM, tokens: int, expected: list[int]
) -> None:
    buffers = lm.new_buffers(tokens + 100)
    rows = range(100, 100 + tokens)  # behind a prefix
    batch = Batch.of_rows(buffers, [7] * tokens, rows, rows)
    parts = batch.parts(PART)
    assert [part.num_tokens for part in parts] == expected
    assert torch.cat([part.rows for part in parts]).tolist() == list(rows)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([200, 200, 200], [400, 200]),
        ([100, 512], [100, 512]),
        ([100, 900], [100, 512, 388]),  # not 512, 488: cut as if it were alone
        ([300, 1000, 20], [300, 512, 508]),
        ([10] * 60, [510, 90]),
    ],
)
def test_what_is_encoded_is_cut_as_if_each_module_were_alone(
    lm: CausalLM, spans: list[int], expected: list[int]
) -> None:
    total = sum(spans)
    ends = [sum(spans[: i + 1]) for i in range(len(spans))]
    pieces = [Span(e - n, e, ((e - n, e),)) for n, e in zip(spans, ends, strict=True)]
    batch = Batch(lm.new_buffers(total), [7] * total, range(total), range(total), pieces)
    assert [part.num_tokens for part in batch.parts(PART)] == expected


def test_what_waits_is_computed_together(lm: CausalLM) -> None:
    compute = Recorded(lm)
    queue = ForwardQueue(compute, joins, PART)
    texts = [ids(seed, 5 + seed) for seed in range(6)]
    compute.may_go.clear()
    threads = Threads()
    for token_ids in texts:
        threads.start(partial(queue.run, whole(lm, token_ids)))
    wait_until(lambda: len(queue) == len(texts))
    compute.may_go.set()
    for logits, token_ids in zip(threads.join(), texts, strict=True):
        assert (logits - plain("llama", token_ids)).abs().max() < TOLERANCE
    # The first was on its way before the others came.
    assert len(compute.sizes) <= 2
    assert sorted(sum(compute.sizes, [])) == sorted(map(len, texts))


def test_steps_go_on_while_a_long_prompt_is_read(lm: CausalLM) -> None:
    compute = Recorded(lm)
    queue = ForwardQueue(compute, joins, PART)
    long_ids = [int(token) for token in torch.arange(6000) % 250 + 3]
    rows = range(len(long_ids))
    running = whole(lm, ids(1, 4))
    queue.run(running)
    compute.may_go.clear()
    compute.sizes.clear()
    threads = Threads()
    threads.start(lambda: _steps(queue, running.buffers, 4))
    wait_until(lambda: len(queue) == 1)
    long = Batch.of_rows(lm.new_buffers(len(long_ids)), long_ids, rows, rows)
    threads.start(lambda: queue.run(long))
    wait_until(lambda: len(queue) == 2)
    compute.may_go.set()
    threads.join()
    steps = [index for index, sizes in enumerate(compute.sizes) if 1 in sizes]
    ended = max(index for index, sizes in enumerate(compute.sizes) if max(sizes) > 1)
    assert steps[-1] < ended, "the answer was held up until the long prompt was read"
    assert max(sum(sizes) for sizes in compute.sizes) <= PART + 1
    assert sum(size for sizes in compute.sizes for size in sizes) == len(long_ids) + 4


def _steps(queue: ForwardQueue, buffers: object, count: int) -> None:
    for row in range(4, 4 + count):
        queue.run(Batch.of_rows(buffers, [7], [row], [row]))  # type: ignore[arg-type]


def test_what_fails_fails_alone(lm: CausalLM) -> None:
    compute = Recorded(lm)
    queue = ForwardQueue(compute, joins, PART)
    texts = [ids(1, 11), ids(2, 13), ids(3, 17)]
    compute.refused_length = 17  # neither the first of those that share a forward nor alone
    compute.may_go.clear()
    threads = Threads()
    for token_ids in texts:
        threads.start(partial(queue.run, whole(lm, token_ids)))
    wait_until(lambda: len(queue) == len(texts))
    compute.may_go.set()
    first, second, third = threads.join()
    assert isinstance(third, MemoryError)
    assert (first - plain("llama", texts[0])).abs().max() < TOLERANCE
    assert (second - plain("llama", texts[1])).abs().max() < TOLERANCE
    assert [13, 17] in compute.sizes


def test_a_prompt_that_nobody_waits_for_is_given_up_between_its_parts(lm: CausalLM) -> None:
    compute = Recorded(lm)
    queue = ForwardQueue(compute, joins, PART)
    long_ids = [int(token) for token in torch.arange(5000) % 250 + 3]
    rows = range(len(long_ids))
    batch = Batch.of_rows(lm.new_buffers(len(long_ids)), long_ids, rows, rows)
    with (
        queue.cancelled_by(lambda: len(compute.sizes) >= 1),
        pytest.raises(RequestCancelledError),
    ):
        queue.run(batch)
    assert compute.sizes == [[PART]]
    # The next one is served as if nothing had been.
    logits = queue.run(whole(lm, ids(1, 9)))
    assert (logits - plain("llama", ids(1, 9))).abs().max() < TOLERANCE


def test_an_interrupt_while_waiting_leaves_the_queue_to_the_others(lm: CausalLM) -> None:
    compute = Recorded(lm)
    queue = ForwardQueue(compute, joins, PART)
    compute.may_go.clear()
    threads = Threads()
    threads.start(partial(queue.run, whole(lm, ids(1, 9))))
    wait_until(lambda: len(queue) == 1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupt_when_waiting() -> None:
        wait_until(lambda: len(queue) == 2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threads.start(interrupt_when_waiting)
        with pytest.raises(KeyboardInterrupt):
            queue.run(whole(lm, ids(2, 11)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    compute.may_go.set()
    first, _ = threads.join()
    assert (first - plain("llama", ids(1, 9))).abs().max() < TOLERANCE
    logits = queue.run(whole(lm, ids(3, 13)))
    assert (logits - plain("llama", ids(3, 13))).abs().max() < TOLERANCE


def test_a_request_that_is_interrupted_leaves_only_when_no_forward_writes_to_its_slot(
    lm: CausalLM,
) -> None:
    begun, may_end = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    calls = iter(range(2))

    def compute(batches: Sequence[Batch]) -> list[torch.Tensor]:
        call = next(calls)
        begun[call].set()
        assert may_end[call].wait(20)
        return [torch.zeros(1) for _ in batches]

    queue = ForwardQueue(compute, joins, PART)
    threads = Threads()
    threads.start(partial(queue.run, whole(lm, ids(1, 9))))
    assert begun[0].wait(20)
    released_at: list[bool] = []

    def interrupt_in_the_second_forward() -> None:
        wait_until(lambda: len(queue) == 2)
        may_end[0].set()
        assert begun[1].wait(20)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]
        time.sleep(0.1)
        released_at.append(True)
        may_end[1].set()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threads.start(interrupt_in_the_second_forward)
        with pytest.raises(KeyboardInterrupt):
            queue.run(whole(lm, ids(2, 11)))
        assert released_at, "it left while the forward was still at its buffers"
    finally:
        signal.signal(signal.SIGUSR1, before)
    threads.join()


def test_the_parts_of_a_prompt_do_not_depend_on_time_or_on_others(lm: CausalLM) -> None:
    sizes: list[list[int]] = []
    waits = iter([0.2, 0, 0.05] * 10)

    def compute(batches: Sequence[Batch]) -> list[torch.Tensor]:
        sizes.append([batch.num_tokens for batch in batches])
        time.sleep(next(waits))
        return [torch.zeros(1) for _ in batches]

    queue = ForwardQueue(compute, joins, PART)
    long = whole(lm, [7] * 1300)
    queue.run(long)
    assert sizes == [[512], [512], [276]]
    sizes.clear()
    threads = Threads()
    threads.start(lambda: queue.run(whole(lm, [7] * 1299)))
    wait_until(lambda: bool(sizes))
    threads.start(lambda: queue.run(whole(lm, [7] * 1400)))
    running = whole(lm, ids(1, 4))
    threads.start(lambda: _steps(queue, running.buffers, 4))
    threads.join()
    parts = [size for each in sizes for size in each if size > 1]
    assert sorted(parts) == [275, 376, 512, 512, 512, 512]


def test_long_prompts_take_turns_and_a_short_one_waits_for_one_turn_of_each(
    lm: CausalLM,
) -> None:
    compute = Recorded(lm)
    queue = ForwardQueue(compute, joins, PART)
    compute.may_go.clear()
    threads = Threads()
    for tokens in (1100, 1101, 100, 1102, 101):
        threads.start(partial(queue.run, whole(lm, [7] * tokens)))
        wait_until(lambda: len(queue) == len(threads))
    compute.may_go.set()
    threads.join()
    # The first was on its way before the others came. Both short ones fit one forward.
    assert compute.sizes == [[512], [512], [100, 101], [512], [512], [512], [512], [76, 77, 78]]


def test_what_may_not_join_runs_whole_and_alone(lm: CausalLM) -> None:
    compute = Recorded(lm)
    queue = ForwardQueue(compute, lambda batch: batch.num_tokens != 13, PART)
    compute.may_go.clear()
    threads = Threads()
    for count in (13, 11, 13, 17):
        threads.start(partial(queue.run, whole(lm, ids(count, count))))
        wait_until(lambda: len(queue) > 0)
    wait_until(lambda: len(queue) == 4)
    compute.may_go.set()
    threads.join()
    assert compute.sizes.count([13]) == 2
    assert sum(map(sum, compute.sizes)) == 54
