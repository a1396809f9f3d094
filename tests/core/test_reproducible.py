"""The same greedy prompt, asked again and again, gets the same answer from a real model."""

from __future__ import annotations

from pathlib import Path

import torch

from pcache_core import CausalLM, Prompt, PromptCacheEngine, SamplingParams

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_without_reuse_a_prompt_has_one_answer(real_lm: CausalLM) -> None:
    engine = PromptCacheEngine(real_lm, reuse="off")
    ids = real_lm.token_ids(TEXT)
    prompts = [Prompt.from_text(real_lm.text.decode(ids[at : at + 500])) for at in (0, 100, 200)]
    params = SamplingParams(max_tokens=6, temperature=0.0)
    first, again = ([engine.generate(p, params).text for p in prompts] for _ in range(2))
    assert first == again
    assert len(set(first)) > 1, "every prompt has the same answer: this shows nothing"


def test_without_reuse_a_prompt_in_parts_has_the_same_bits_again(real_lm: CausalLM) -> None:
    engine = PromptCacheEngine(real_lm, reuse="off")
    prompt = Prompt.from_text(real_lm.text.decode(real_lm.token_ids(TEXT)[:1100]))
    first = engine.prefill(prompt).logits
    engine.generate(Prompt.from_text(TEXT[:200]), SamplingParams(max_tokens=3))
    assert torch.equal(engine.prefill(prompt).logits, first)
