"""What a caller switches on in torch changes no answer; weights that give no numbers are told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from pcache_core import (
    CausalLM,
    MemoryStore,
    ModelError,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)

PROMPT = Prompt(
    [
        Segment("Ann keeps bees on a hill near Oslo.", "document"),
        Segment("Ben sold a red boat to a friend.", "document"),
        Segment("\nWho?"),
    ]
)
SHORT = SamplingParams(max_tokens=4)


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
        torch.enable_grad,
    ],
    ids=["autocast", "inference mode", "no grad", "grad"],
)
def test_a_mode_around_a_request_changes_neither_its_answer_nor_those_after_it(
    llama: CausalLM, mode: Callable[[], AbstractContextManager[object]]
) -> None:
    longer = Prompt([*PROMPT.segments, Segment(" And where?")])
    plain = PromptCacheEngine(llama, reuse="fast")
    expected = [plain.prefill(PROMPT).logits, plain.prefill(longer).logits]
    with mode():
        lm = CausalLM(copy.deepcopy(llama.model), llama.tokenizer)
        engine = PromptCacheEngine(lm, MemoryStore(), reuse="fast")
        engine.encode(["Ann keeps bees on a hill near Oslo."], progress=False)
        first = engine.prefill(PROMPT).logits
        engine.generate(PROMPT, SHORT)
    torch.testing.assert_close(first, expected[0])
    torch.testing.assert_close(engine.prefill(longer).logits, expected[1], atol=1e-4, rtol=1e-4)
    engine.generate(longer, SHORT, "balanced", 2)
    with mode():
        engine.generate(longer, SHORT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_no_numbers_is_told(
    llama: CausalLM, value: float, temperature: float
) -> None:
    lm = CausalLM(copy.deepcopy(llama.model), llama.tokenizer)
    lm.model.lm_head.weight.data[7] = value
    store = MemoryStore()
    engine = PromptCacheEngine(lm, store, reuse="fast")
    with pytest.raises(ModelError, match=r"NaN or infinite.*dtype='float32'"):
        engine.generate(PROMPT, SamplingParams(max_tokens=4, temperature=temperature))
    assert store.stats().states == 0


def test_logits_may_be_changed_in_place(llama: CausalLM) -> None:
    logits = PromptCacheEngine(llama).prefill(PROMPT).logits
    assert float(logits.fill_(1).sum()) == len(logits)
