"""Which models run through our own attention, so that a fault there can't hide in a fallback."""

from __future__ import annotations

import pytest

import tiny_models
from pcache_core.lm.forward import RaggedForward, SequentialForward
from pcache_core.lm.probe import probe
from subjects import SEQUENTIAL

NO_SLOTS = {"mamba", "mamba2", "jamba", "qwen3_next", "lfm2", "bamba", "deepseek_v32"}


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_models_run_through_our_attention_unless_they_do_not_route_it(name: str) -> None:
    forward = probe(tiny_models.build(name)).forward
    if name in NO_SLOTS:
        assert forward is None
    else:
        assert type(forward) is (SequentialForward if name in SEQUENTIAL else RaggedForward)
