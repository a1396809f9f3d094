"""Fixtures for every test: no network, one thread, tiny random models."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch

import tiny_models
from pcache_core import CausalLM


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # more are slower for tiny models, many times so on a busy machine


@pytest.fixture(scope="session")
def tiny_lm() -> Callable[..., CausalLM]:
    """A factory: `tiny_lm("llama", seed=0)` is a new random model with the byte tokenizer."""

    def make(name: str = "llama", *, seed: int = 0) -> CausalLM:
        return CausalLM(tiny_models.build(name, seed=seed), tiny_models.tiny_tokenizer())

    return make
