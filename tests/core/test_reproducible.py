"""The same greedy prompt, asked again and again, gets the same answer from a real model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pcache_core import CausalLM, Prompt, PromptCacheEngine, SamplingParams

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("tokens", "prompts", "calls"), [(500, 6, 3), (1300, 2, 3)])
def test_without_reuse_a_prompt_has_one_answer(
    smollm2: CausalLM, tokens: int, prompts: int, calls: int
) -> None:
    engine = PromptCacheEngine(smollm2, reuse="off")
    ids = smollm2.token_ids(TEXT)
    asked = [
        Prompt.from_text(smollm2.text.decode(ids[start : start + tokens]))
        for start in range(0, 100 * prompts, 100)
    ]
    found = [
        [engine.generate(prompt, SamplingParams(max_tokens=6, temperature=0.0)) for prompt in asked]
        for _ in range(calls)
    ]
    answers = [{found[call][number].text for call in range(calls)} for number in range(prompts)]
    assert [len(each) for each in answers] == [1] * prompts
    assert len(set.union(*answers)) > 1, "every prompt has the same answer: this shows nothing"


def test_without_reuse_a_prompt_in_parts_has_the_same_bits_again(smollm2: CausalLM) -> None:
    engine = PromptCacheEngine(smollm2, reuse="off")
    prompt = Prompt.from_text(smollm2.text.decode(smollm2.token_ids(TEXT)[:1100]))
    first = engine.prefill(prompt).logits
    engine.generate(Prompt.from_text(TEXT[:200]), SamplingParams(max_tokens=3))
    assert torch.equal(engine.prefill(prompt).logits, first)
