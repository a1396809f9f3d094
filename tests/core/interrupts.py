"""Interrupts requests at random moments, and looks whether the engine answers the next one.

Some interrupts are a signal after a random time, which mostly lands in the model. The others
come where a function that keeps books, or that threads wait with, is entered or left: there Python
looks for signals.

Run by a test for some seconds; by hand for as long as you like:
`python tests/core/interrupts.py --seconds 600 --seed 7`. Exits with 1 where something hung or an
answer was wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
from pcache_core import (
    CausalLM,
    DiskStore,
    MemoryStore,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
    TieredStore,
)
from pcache_core.params import ReuseMode

MODES: tuple[ReuseMode, ...] = ("off", "exact", "fast", "balanced")
PARAMS = SamplingParams(max_tokens=3, timeout_s=60)
_LONGEST_ANSWER_S = 15
_WATCHED = (
    "engine.py", "scheduler.py", "prefix_cache.py", "states.py", "forward_queue.py",
    "tiered.py", "pcache_core/threads.py", "/threading.py", "contextlib.py", "weakref",
)  # fmt: skip


def prompts() -> list[Prompt]:
    texts = ["Ann keeps bees on a hill near Oslo.", "Ben sold a red boat to a friend of hers."]
    orders = [texts, texts[::-1], texts[:1]]
    return [
        Prompt([*(Segment(text, "document") for text in order), Segment("\nWho?")])
        for order in orders
    ]


class Guard:
    """Ends the process where an answer takes too long, and says where every thread is."""

    def __enter__(self) -> None:
        faulthandler.dump_traceback_later(_LONGEST_ANSWER_S, exit=True)

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()


Place = tuple[str, int, str, str]
"""A file, a function's line, what happens there, and which function of C it calls."""


class Watch:
    """Counts how often each place is passed; raises KeyboardInterrupt at one of them.

    place, number: where, and the how manieth time.
    """

    def __init__(self, place: Place | None = None, number: int = 0) -> None:
        self.passed: Counter[Place] = Counter()
        self._place = place
        self._number = number

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "c_call" or not any(part in code.co_filename for part in _WATCHED):
            return
        called = str(getattr(argument, "__qualname__", "")) if event == "c_return" else ""
        place = (code.co_filename, code.co_firstlineno, event, called)
        self.passed[place] += 1
        if place == self._place and self.passed[place] == self._number:
            raise KeyboardInterrupt


ASKED = [(prompt, mode) for prompt in prompts() for mode in MODES]


def passed_places(engine: PromptCacheEngine) -> Counter[Place]:
    """Where all kinds of requests pass, and how often."""
    watch = Watch()
    for prompt, mode in ASKED:
        sys.setprofile(watch)
        engine.generate(prompt, PARAMS, mode)
        sys.setprofile(None)
    return watch.passed


def is_interrupted(
    engine: PromptCacheEngine, number: int, chance: random.Random, passed: Counter[Place]
) -> bool:
    """Interrupt a request, if it is not done before; return whether it was."""
    prompt, mode = ASKED[number]
    place = chance.choice(sorted(passed))
    watch = Watch(place, chance.randint(1, 1 + passed[place] // len(ASKED)))
    try:
        try:
            if chance.random() < 0.2:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.04))
            else:
                sys.setprofile(watch)
            engine.generate(prompt, PARAMS, mode)
        finally:
            sys.setprofile(None)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False


class Others:
    """Threads that ask as well, and are never interrupted."""

    def __init__(self, engine: PromptCacheEngine, count: int) -> None:
        self._engine = engine
        self._is_over = False
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(count)]
        self.answers: dict[int, set[tuple[int, ...]]] = {}
        for thread in self._threads:
            thread.start()

    def _ask(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._is_over:
            number = chance.randrange(0, len(ASKED), len(MODES))
            answer = self._engine.generate(ASKED[number][0], PARAMS, "off").token_ids
            self.answers.setdefault(number, set()).add(answer)

    def finish(self) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run(seconds: float, seed: int, others: int) -> int:
    """Interrupt again and again; return how often. Raises: AssertionError: an answer is wrong."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, interrupt)
    chance = random.Random(seed)
    lm = CausalLM(tiny_models.build("llama"), tiny_models.tiny_tokenizer())
    store = TieredStore([MemoryStore(), DiskStore(tempfile.mkdtemp())])
    engine = PromptCacheEngine(lm, store, repair=4)
    passed = passed_places(engine)
    first = {}
    for number, (prompt, mode) in enumerate(ASKED):
        engine.clear()
        first[number] = engine.generate(prompt, PARAMS, mode).token_ids
    plain = [first[number - number % len(MODES)] for number in range(len(ASKED))]
    beside = Others(engine, others)
    ends, count = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        number = chance.randrange(len(ASKED))
        if chance.random() < 0.2:
            engine.clear()
        count += is_interrupted(engine, number, chance, passed)
        # Exact rows may stand in for states, so only these two modes have one answer.
        mode = chance.choice(["off", "exact"])
        with Guard():
            found = engine.generate(ASKED[number][0], PARAMS, mode).token_ids
        assert found == plain[number], (number, mode, found, plain[number])
    with Guard():
        beside.finish()
        store.flush()
    for number, (prompt, mode) in enumerate(ASKED):
        with Guard():
            engine.clear()
            found = engine.generate(prompt, PARAMS, mode).token_ids
        assert found == first[number], (mode, found, first[number])
    assert all(beside.answers[number] == {plain[number]} for number in beside.answers)
    assert engine.kv_bytes() == 0, "an interrupted request holds its buffers"
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--others", type=int, default=0, help="threads that ask as well")
    options = parser.parse_args(arguments)
    count = run(options.seconds, options.seed, options.others)
    sys.stdout.write(f"{count} interrupts\n")


if __name__ == "__main__":
    main()
