"""A tiny random Llama in fp32."""

from __future__ import annotations

import pytest
import torch

from pcache_core import CausalLM
from pcache_integrations.bench.models import random_llama


@pytest.fixture(scope="session")
def tiny_llama() -> CausalLM:
    return random_llama("llama-tiny", torch.float32, context_tokens=1024, seed=0)
