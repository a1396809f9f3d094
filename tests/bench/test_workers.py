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
from pcache_integrations.bench.models import save

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


def test_a_failure_is_an_answer_and_the_worker_goes_on(ask: Ask, tmp_path: Path) -> None:
    assert "error" in ask("load", model=str(tmp_path / "none"), **_OPTIONS)
    assert ask("hello")["missing"] == []
