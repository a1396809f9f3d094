"""Ask one engine in every way at once for minutes, and count what is wrong or lost.

    python benchmarks/soak.py --minutes 10

Threads and tasks ask questions in all modes over documents in changing orders; some give up in the
middle of an answer, some set a time limit. Meanwhile the folder of states is cleared, documents are
forgotten and encoded again, and the main thread's own requests are interrupted as by Ctrl-C.

An answer counts as right if the same prompt, asked alone, has that answer in some mode: what a
prefix has in store decides which rows are exact, and so which of them it is. At the end nothing may
run or wait, no request may hold keys and values, and memory and threads are compared with those
after the first minute. Exits with 1 if anything was wrong or lost.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

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
from pcache_core.errors import DeadlineExceededError
from pcache_core.evaluation.data import WorldOptions, tiny_world
from pcache_core.params import REUSE_MODES

PARAMS = SamplingParams(max_tokens=12, stop=["\n"])
OPENING = "Answer the question from the documents.\n\n"
_LONGEST_INTERVAL_S = 2.0


class Soak:
    """One engine, its prompts with their right answers, and the count of what happened."""

    def __init__(self, folder: Path, model: str, questions: int) -> None:
        self.folder = folder
        self.lm = CausalLM.from_pretrained(model, dtype="float32")
        self.texts: list[str] = []
        self.prompts: list[Prompt] = []
        for item in tiny_world(WorldOptions(documents=6, seed=7), questions).items:
            self.texts += item.contexts
            for order in (item.contexts, item.contexts[::-1]):
                documents = [Segment(text + "\n\n", "document") for text in order]
                question = Segment(f"Question: {item.question}\nAnswer:", "argument")
                self.prompts.append(Prompt([Segment(OPENING, "literal"), *documents, question]))
        self.right = [self._answers(prompt) for prompt in self.prompts]
        # A small memory, so that states come from the folder again and again.
        memory = MemoryStore(budget_bytes=400 * self.lm.bytes_per_token)
        store = TieredStore([memory, DiskStore(folder / "states")])
        self.engine = PromptCacheEngine(self.lm, store, max_running=8)
        self.counts: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self.is_over = threading.Event()
        self._lock = threading.Lock()

    def _answers(self, prompt: Prompt) -> set[str]:
        """Return the answers to a prompt that is asked alone, in every mode."""
        return {
            PromptCacheEngine(self.lm).generate(prompt, PARAMS, reuse=mode).text
            for mode in REUSE_MODES
        }

    def count(self, *names: str) -> None:
        """Note that something happened."""
        with self._lock:
            self.counts.update(names)

    def check(self, number: int, answer: str) -> None:
        """Note a whole answer, right or wrong."""
        is_right = answer in self.right[number]
        self.count("answers", *([] if is_right else ["wrong"]))
        if not is_right:
            print(f"wrong: {answer!r}, not one of {self.right[number]}", file=sys.stderr)

    def ask(self, chance: random.Random) -> None:
        """Ask once: to the end, to be given up, or with a time limit."""
        number, mode = chance.randrange(len(self.prompts)), chance.choice(REUSE_MODES)
        params, way = PARAMS, chance.random()
        if way < 0.1:
            params = SamplingParams(max_tokens=12, stop=["\n"], timeout_s=chance.uniform(0.01, 0.3))
        text = ""
        try:
            with closing(self.engine.stream(self.prompts[number], params, mode)) as chunks:
                for piece, chunk in enumerate(chunks):
                    text += chunk.text
                    if 0.1 <= way < 0.3 and piece == chance.randrange(3):
                        self.count("given up")
                        return
        except DeadlineExceededError:
            self.count("too late")
            return
        self.check(number, text)

    async def aask(self, chance: random.Random) -> None:
        """Ask as a task, which may be cancelled."""
        number, mode = chance.randrange(len(self.prompts)), chance.choice(REUSE_MODES)
        asked = self.engine.agenerate(self.prompts[number], PARAMS, mode)
        limit_s = chance.uniform(0.01, 0.5) if chance.random() < 0.3 else None
        try:
            generation = await asyncio.wait_for(asked, limit_s)
        except TimeoutError:
            self.count("cancelled")
            return
        self.check(number, generation.text)

    def guarded(self, job: Callable[[random.Random], None], chance: random.Random) -> None:
        """Run a thread's job; what it raises ends the soak."""
        try:
            job(chance)
        except BaseException as error:
            self.failures.append(error)

    def ask_on(self, chance: random.Random) -> None:
        """Ask until it is over."""
        while not self.is_over.is_set():
            self.ask(chance)

    def run_tasks(self, chance: random.Random) -> None:
        """Ask by tasks of one event loop until it is over."""

        async def together() -> None:
            while not self.is_over.is_set():
                await asyncio.gather(*(self.aask(chance) for _ in range(6)))

        asyncio.run(together())

    def disturb(self, chance: random.Random) -> None:
        """Clear the folder, forget documents or encode some, now and then."""
        while not self.is_over.wait(chance.uniform(0.1, _LONGEST_INTERVAL_S)):
            what = chance.choice(("cleared", "removed", "forgotten", "encoded"))
            if what == "cleared":
                self.engine.clear()
            elif what == "removed":
                shutil.rmtree(self.folder / "states", ignore_errors=True)
            elif what == "forgotten":
                self.engine.forget(chance.sample(self.texts, 3))
            else:
                self.engine.encode(chance.sample(self.texts, 3), progress=False)
            self.count(what)

    def interrupted(self, chance: random.Random) -> None:
        """Ask in the main thread and be interrupted by a signal, sooner or later."""
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.4))
            try:
                self.ask(chance)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            self.count("interrupted")


def run(soak: Soak, minutes: float, seed: int) -> list[str]:
    """Run for some minutes; return what is wrong at the end."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    jobs = [soak.ask_on, soak.ask_on, soak.ask_on, soak.run_tasks, soak.disturb]
    threads = [
        threading.Thread(target=soak.guarded, args=(job, random.Random(seed + number)))
        for number, job in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    started, chance, early_mib = time.monotonic(), random.Random(seed - 1), 0.0
    while time.monotonic() - started < 60 * minutes and not soak.failures:
        soak.interrupted(chance)
        if not early_mib and time.monotonic() - started > min(60, 30 * minutes):
            early_mib = resident_mib()
    soak.is_over.set()
    for thread in threads:
        thread.join(60)
    return [repr(error) for error in soak.failures] + lost(soak, threads, early_mib)


def lost(soak: Soak, threads: list[threading.Thread], early_mib: float) -> list[str]:
    """Return what did not come back."""
    patience = time.monotonic() + 30  # for those who were given up and have yet to notice
    while soak.engine.stats().running and time.monotonic() < patience:
        time.sleep(0.1)
    gc.collect()
    stats, now_mib = soak.engine.stats(), resident_mib()
    print(f"memory: {early_mib:.0f} MiB after the first minute, {now_mib:.0f} at the end")
    found = {
        "threads that hang": sum(thread.is_alive() for thread in threads),
        "running": stats.running,
        "waiting": stats.waiting,
        "bytes of keys and values": soak.engine.kv_bytes(),
        "wrong": soak.counts["wrong"],
        "MiB more than 1.3 times the first minute's": max(0, round(now_mib - 1.3 * early_mib)),
    }
    return [f"{count} {name}" for name, count in found.items() if count]


def resident_mib() -> float:
    """Return this process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    """Run the soak and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", default="builtin:tiny-rag")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pcache-soak-") as folder:
        soak = Soak(Path(folder), arguments.model, arguments.questions)
        found = run(soak, arguments.minutes, arguments.seed)
    print(", ".join(f"{count:,} {name}" for name, count in sorted(soak.counts.items())))
    print("; ".join(found) if found else "nothing wrong, nothing lost")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
