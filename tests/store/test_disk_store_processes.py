"""The disk store and several processes: killed ones, ones that write the same, fresh ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from pcache_core import CausalLM, DiskStore, Prompt, PromptCacheEngine, Segment

ROOT = Path(__file__).parents[1]

KILLED_ENGINES = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import tiny_models
from pcache_core import CausalLM, DiskStore, MemoryStore, Prompt, PromptCacheEngine, Segment

lm = CausalLM(tiny_models.build("llama", seed=3), tiny_models.tiny_tokenizer())
lm.fingerprint
folder, rounds = sys.argv[1], int(sys.argv[2])
texts = [f"Document {n}: the river runs past mill number {n}, and on." * 2 for n in range(12)]
question = Segment("\\nWhere is the mill?", "text")
chance = random.Random(0)
prompts = [
    Prompt([*(Segment(text, "document") for text in chance.sample(texts, 3)), question])
    for _ in range(rounds)
]
right = [PromptCacheEngine(lm, MemoryStore(), "fast").prefill(p).logits for p in prompts]
answered = wrong = damaged = cut_off = from_disk = 0

def unfinished():
    return {name for _, _, names in os.walk(folder) for name in names if name.endswith(".tmp")}

for prompt, expected in zip(prompts, right):
    before, until = unfinished(), time.monotonic() + 5
    child = os.fork()
    if child == 0:
        while True:
            engine = PromptCacheEngine(lm, DiskStore(folder), "fast")
            for text in chance.sample(texts, len(texts)):
                engine.encode([text], progress=False)
            for name in os.listdir(folder):
                for file in os.listdir(os.path.join(folder, name)):
                    os.unlink(os.path.join(folder, name, file))
    time.sleep(chance.uniform(0.005, 0.06))
    while answered % 2 and not unfinished() - before and time.monotonic() < until:
        pass  # every other one is killed while it writes, however busy the machine is
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut_off += bool(unfinished() - before)
    store = DiskStore(folder)
    prefill = PromptCacheEngine(lm, store, "fast").prefill(prompt)
    answered += 1
    wrong += not torch.allclose(prefill.logits, expected, rtol=0, atol=1e-4)
    damaged += store.stats().damaged
    from_disk += sum(segment.source == "disk" for segment in prefill.report.segments)
print(json.dumps({
    "killed": answered, "wrong": wrong, "damaged": damaged, "cut_off": cut_off, "disk": from_disk,
}))
"""

ENCODING = """
import json, sys
import torch
torch.set_num_threads(1)
import test_disk_store_processes as t
sys.stdin.readline()  # both begin together
print(json.dumps(t.answered(sys.argv[1], encodes=True)))
"""


def answered(folder: str, *, encodes: bool) -> dict[str, Any]:
    """What an engine over a folder of states encodes, and what it says to a prompt."""
    lm = CausalLM(tiny_models.build("llama", seed=3), tiny_models.tiny_tokenizer())
    store = DiskStore(folder)
    engine = PromptCacheEngine(lm, store, "fast")
    texts = [f"Document {n}: the river runs past mill number {n}, and on." for n in range(40)]
    if encodes:
        engine.encode(texts, progress=False)
    documents = [Segment(text, "document") for text in texts[2:5]]
    question = Segment("\nWhere is the mill?", "text")
    prefill = engine.prefill(Prompt([Segment("Read:\n", "literal"), *documents, question]))
    return {
        "tokens": prefill.report.encoded_tokens,
        "sources": [s.source for s in prefill.report.segments],
        "logits": prefill.logits.tolist(),
        "damaged": store.stats().damaged,
        "states": store.stats().states,
    }


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "store"), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def finish(process: subprocess.Popen[str], line: str = "") -> dict[str, Any]:
    output, _ = process.communicate(line + "\n", timeout=280)
    assert process.returncode == 0
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def test_a_hundred_killed_engines_cost_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while they encode, write and clear; another answers from what they leave."""
    counts = finish(start(KILLED_ENGINES, str(tmp_path), "100"))
    with capsys.disabled():
        print(f"\n{counts}", end="")
    assert (counts["killed"], counts["wrong"], counts["damaged"]) == (100, 0, 0)
    assert counts["cut_off"] > 5, "too few were killed while they wrote"
    assert counts["disk"] > 50


def test_two_processes_that_encode_one_corpus_agree_and_a_third_encodes_nothing(
    tmp_path: Path,
) -> None:
    both = [start(ENCODING, str(tmp_path)) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    first, second = (finish(process) for process in both)
    third = answered(str(tmp_path), encodes=False)
    assert first["logits"] == second["logits"] == third["logits"]
    assert (third["tokens"], third["sources"][1:4]) == (0, ["disk"] * 3)
    assert first["states"] == second["states"] == third["states"]
    assert [run["damaged"] for run in (first, second, third)] == [0, 0, 0]
    assert not list(tmp_path.rglob("*.tmp"))
