"""Ctrl-C at any moment, and a fork while others generate, leave an engine that answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pcache_core import CausalLM, MemoryStore, Prompt, PromptCacheEngine, SamplingParams, Segment

SCRIPT = Path(__file__).with_name("interrupts.py")
PROMPT = Prompt([Segment("Ann keeps bees on a hill.", "document"), Segment("\nWho keeps bees?")])
PARAMS = SamplingParams(max_tokens=4)


@pytest.mark.parametrize(("seed", "others"), [(1, 0), (2, 1)])
def test_an_interrupt_at_any_moment_leaves_an_engine_that_answers(seed: int, others: int) -> None:
    command = [sys.executable, str(SCRIPT), "--seconds", "8"]
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [*command, "--seed", str(seed), "--others", str(others)],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 10, "too few were interrupted: this shows nothing"


def answer_of_a_child(ask: Callable[[], object], timeout_s: float) -> bool:
    """Whether a forked child got the answer, which `ask` checks, in time."""
    child = os.fork()
    if child == 0:
        try:
            ask()
            os._exit(0)
        except BaseException:
            os._exit(1)
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_is_forked_while_others_generate_can_generate(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    engine = PromptCacheEngine(tiny_lm("llama"), MemoryStore(), reuse="fast", max_running=4)
    expected = {mode: engine.generate(PROMPT, PARAMS, mode).token_ids for mode in ("off", "fast")}
    is_over = threading.Event()

    def ask_on() -> None:
        while not is_over.is_set():
            engine.generate(PROMPT, PARAMS, "off")
            engine.clear()
            engine.generate(PROMPT, PARAMS)

    def ask_in_child() -> None:
        for mode in ("off", "fast"):
            assert engine.generate(PROMPT, PARAMS, mode).token_ids == expected[mode]
        assert (engine.stats().running, engine.kv_bytes()) == (0, 0)

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        answered = 0
        for _ in range(12):
            time.sleep(0.02)
            answered += answer_of_a_child(ask_in_child, 20)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert answered == 12
