"""What a worker says over its standard input and output, and that the peer computes rightly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pcache_integrations.bench
from pcache_core import CausalLM
from pcache_integrations.bench.gguf_file import write_gguf
from pcache_integrations.bench.models import save
from pcache_integrations.bench.peers import PEERS, LoadOptions
from pcache_integrations.bench.run import started

_WORKERS = Path(pcache_integrations.bench.__file__).parent / "workers"
_OPTIONS = {
    "threads": 1, "dtype": "float32", "device": "cpu", "context_tokens": 512, "kv_bytes": 0,
}  # fmt: skip

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask() -> Iterator[Ask]:
    """Speaks to a worker for transformers; whatever it prints itself goes elsewhere."""
    with subprocess.Popen(
        [sys.executable, str(_WORKERS / "transformers_worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def say(op: str, **arguments: Any) -> dict[str, Any]:
            process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield say
        process.stdin.close()
        assert process.wait(30) == 0, "a worker ends when its input does"


def greedy(lm: CausalLM, prompt_ids: list[int], count: int) -> list[int]:
    """By the whole model over the whole text, token by token."""
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(count):
            logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def test_transformers_worker_reuses_a_prefix_and_answers_as_the_model(
    ask: Ask, tiny_llama: CausalLM, tmp_path: Path
) -> None:
    save(tiny_llama, tmp_path)
    hello = ask("hello")
    assert hello["missing"] == []
    assert hello["version"].startswith("transformers ")
    assert ask("load", model=str(tmp_path), **_OPTIONS) == {}
    first = list(range(5, 105))
    others = {"same prefix": [*first[:80], *range(300, 320)], "other": list(range(700, 790))}
    cached = {"same prefix": 80, "other": 0}
    asked = {"first": first, **others}
    for name, prompt_ids in asked.items():
        answer = ask("run", prompt_ids=prompt_ids, text="", max_tokens=4)
        assert answer["tokens"] == greedy(tiny_llama, prompt_ids, 4), name
        assert answer["cached_tokens"] == cached.get(name, 0), name
        assert answer["prompt_tokens"] == len(prompt_ids)
        assert answer["ttft_ms"] > 0
        assert answer["decode_tokens_per_s"] > 0
    assert ask("run", prompt_ids=others["other"], text="", max_tokens=1)["cached_tokens"] == 89
    ask("reset")
    assert ask("run", prompt_ids=others["other"], text="", max_tokens=1)["cached_tokens"] == 0


@pytest.mark.parametrize("name", ["langchain", "llama-cpp", "vllm"])
def test_other_peers_read_the_same_prompt_and_answer_as_the_model(
    name: str, tiny_llama: CausalLM, tmp_path: Path
) -> None:
    spec = PEERS[name]
    with started({name: sys.executable}) as (peer,):
        if peer.problem is not None:
            pytest.skip(f"{spec.label} is not installed here: pip install {spec.install}")
        if spec.weights == "gguf":
            write_gguf(tiny_llama, tmp_path / "model.gguf", "f32")
        else:
            save(tiny_llama, tmp_path)
        weights = tmp_path / "model.gguf" if spec.weights == "gguf" else tmp_path
        peer.load(weights, LoadOptions(1, "float32", "cpu", 512, 2**26))
        text = " porter nurse kayaking" * 30
        prompt_ids = tiny_llama.text.bos_ids + tuple(tiny_llama.token_ids(text))
        for cached in (0, len(prompt_ids) - 1):
            sample = peer.run(prompt_ids, text, 4)
            if spec.takes == "ids":
                assert sample.first_token == greedy(tiny_llama, list(prompt_ids), 1)[0]
            if spec.keeps_prefix:
                assert cached - 128 < sample.cached_tokens <= cached  # vLLM counts in blocks
            assert sample.decode_tokens_per_s


def test_a_failure_is_an_answer_and_the_worker_goes_on(ask: Ask, tmp_path: Path) -> None:
    assert "error" in ask("load", model=str(tmp_path / "none"), **_OPTIONS)
    assert ask("hello")["missing"] == []
