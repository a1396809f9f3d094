"""Three real servers: two replicas of the tiny model over one Redis, and a random model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pcache_core import CausalLM
from redis_server import Server
from tiny_models import excite, tiny_tokenizer
from vllm_server import Cluster, VllmServer, interpreter

RANDOM_PREAMBLE = {
    "opening": "These are the papers of the town:\n",
    "company": ["The bells of the old church were cast in a field beside the river."],
}
FEW_BLOCKS = (
    *("--block-size", "32", "--num-gpu-blocks-override", "49", "--max-model-len", "1024"),
)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    interpreter()  # skips where there is none
    folder = tmp_path_factory.mktemp("vllm")
    redis = Server(folder)
    model = folder / "random"
    _save_random(model)
    tiny, store = "builtin:tiny-rag", folder / "states"
    preamble = folder / "preamble.json"
    preamble.write_text(json.dumps(RANDOM_PREAMBLE))
    with ExitStack() as stack:
        stack.callback(redis.kill)
        servers = [
            VllmServer(folder, tiny, redis.url),
            VllmServer(folder, tiny, redis.url, *FEW_BLOCKS),
            VllmServer(folder, str(model), str(store), preamble=preamble),
        ]
        with ThreadPoolExecutor(len(servers)) as pool:
            for server in servers:
                stack.callback(server.stop)
            list(pool.map(VllmServer.start, servers))
        yield Cluster(redis, *servers, store, preamble)


@pytest.fixture(scope="session")
def tiny() -> CausalLM:
    return CausalLM.from_pretrained("builtin:tiny-rag")


def _save_random(folder: Path) -> None:
    config = Qwen3Config(
        vocab_size=288,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        excite(model, seed=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
