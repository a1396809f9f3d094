"""The same prompt in the same mode has the same answer, whatever was asked before it.

What may differ, and is not looked at here, is written down in docs/operating.md: rows that were
computed exactly stand in for states at the beginning of a later prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pcache_core import CausalLM, Prompt, PromptCacheEngine, SamplingParams, Segment
from pcache_core.params import ReuseMode

DOCUMENTS = [
    "Ann keeps bees in Oslo, on the hill behind the old station.",
    "Ben sold a red boat to a friend of hers, who painted it green.",
    "The mill at the river was closed when the last miller left.",
    "In winter the ferry goes at seven, at noon and once more at nine.",
]
QUESTIONS = ["\nWho keeps bees?", "\nWhen does the ferry go?", "\nWho keeps bees? And where?"]
REPAIR = 6  # far less than half of any two documents
LIMIT = SamplingParams(max_tokens=6)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


def prompt_of(numbers: list[int], question: str, between: str = "\n") -> Prompt:
    segments = [Segment("Answer from these.\n")]
    for number in numbers:
        segments += [Segment(DOCUMENTS[number], "document"), Segment(between)]
    return Prompt([*segments, Segment(question)])


def prompts(seed: int) -> Iterator[Prompt]:
    """Prompts that share documents, orders, beginnings and questions."""
    chance = random.Random(seed)
    while True:
        numbers = chance.sample(range(len(DOCUMENTS)), chance.randint(2, 3))
        yield prompt_of(numbers, chance.choice(QUESTIONS), chance.choice(["\n", "\nNext:\n"]))


def cold(lm: CausalLM, prompt: Prompt, mode: ReuseMode) -> torch.Tensor:
    """The logits of an engine that was asked nothing before."""
    return PromptCacheEngine(lm, reuse=mode, repair=REPAIR).prefill(prompt).logits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("modes", [("fast", "off"), ("balanced", "fast", "high", "off")])
def test_a_prompt_after_others_has_the_answer_of_a_first_one(
    llama: CausalLM, modes: tuple[ReuseMode, ...], seed: int
) -> None:
    chance = random.Random(seed)
    engine = PromptCacheEngine(llama, repair=REPAIR)
    prefixes = 0
    for _, prompt in zip(range(12), prompts(seed), strict=False):
        mode = chance.choice(modes)
        if chance.random() < 0.5:
            engine.generate(prompt, LIMIT, mode)
        found = engine.prefill(prompt, mode)
        prefixes += found.report.segments[-1].source == "prefix"
        torch.testing.assert_close(found.logits, cold(llama, prompt, mode), **CLOSE)
    assert prefixes > 0, "nothing was gone on from: this shows nothing"


@pytest.mark.parametrize("mode", ["off", "exact", "fast", "balanced", "high"])
@pytest.mark.parametrize("before", ["off", "exact", "fast", "balanced", "high"])
def test_twice_in_a_row_a_prompt_has_the_same_answer_in_every_mode(
    llama: CausalLM, before: ReuseMode, mode: ReuseMode
) -> None:
    engine = PromptCacheEngine(llama, repair=REPAIR)
    prompt = prompt_of([0, 1, 2], QUESTIONS[0])
    engine.generate(prompt_of([0, 1, 3], QUESTIONS[1]), LIMIT, before)
    engine.generate(prompt, LIMIT, before)
    first = engine.prefill(prompt, mode).logits
    torch.testing.assert_close(engine.prefill(prompt, mode).logits, first, **CLOSE)
    texts = {engine.generate(prompt, LIMIT, mode).text for _ in range(3)}
    assert len(texts) == 1


@pytest.mark.parametrize("seed", range(3))
def test_exact_and_off_are_the_same_after_anything(llama: CausalLM, seed: int) -> None:
    chance = random.Random(seed)
    engine = PromptCacheEngine(llama, repair=REPAIR)
    modes: tuple[ReuseMode, ...] = ("off", "exact", "fast", "balanced", "high")
    for _, prompt in zip(range(12), prompts(seed), strict=False):
        engine.generate(prompt, LIMIT, chance.choice(modes))
        plain = engine.prefill(prompt, "off").logits
        torch.testing.assert_close(plain, cold(llama, prompt, "off"), **CLOSE)
        torch.testing.assert_close(engine.prefill(prompt, "exact").logits, plain, **CLOSE)


@pytest.mark.parametrize("mode", ["exact", "fast", "balanced", "high"])
def test_a_chat_that_continues_keeps_what_it_said(llama: CausalLM, mode: ReuseMode) -> None:
    """The second turn is what one would be that was computed right after the first."""
    engine = PromptCacheEngine(llama, reuse=mode, repair=REPAIR)
    first = prompt_of([0, 1, 2], QUESTIONS[0])
    answer = engine.generate(first, LIMIT)
    turn = llama.text.decode(answer.token_ids)
    second = Prompt([*first.segments, Segment(turn), Segment(QUESTIONS[1])])
    expected = engine.prefill(second)
    assert expected.report.segments[0].source == "prefix"
    others = PromptCacheEngine(llama, reuse=mode, repair=REPAIR)
    others.generate(first, LIMIT)
    others.generate(prompt_of([3, 1], QUESTIONS[1]), LIMIT)
    others.generate(prompt_of([0, 1, 2], QUESTIONS[2]), LIMIT)
    torch.testing.assert_close(others.prefill(second).logits, expected.logits, **CLOSE)


@pytest.mark.parametrize("mode", ["exact", "fast", "balanced"])
def test_a_stream_beside_others_has_its_own_answer(llama: CausalLM, mode: ReuseMode) -> None:
    asked = [prompt for _, prompt in zip(range(8), prompts(5), strict=False)]
    alone = [
        PromptCacheEngine(llama, reuse=mode, repair=REPAIR).generate(prompt, LIMIT).text
        for prompt in asked
    ]
    engine = PromptCacheEngine(llama, reuse=mode, repair=REPAIR)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: engine.generate(prompt, LIMIT).text, asked))
    assert answers == alone


@pytest.mark.parametrize("later", ["fast", "balanced"])
def test_exact_rows_at_the_beginning_bring_a_later_answer_nearer_to_off(
    llama: CausalLM, later: ReuseMode
) -> None:
    """What may differ: exact prefix first. With all of the prompt exact, the answer is `off`'s."""
    engine = PromptCacheEngine(llama, repair=REPAIR)
    prompt = prompt_of([0, 1, 2], QUESTIONS[0])
    plain = cold(llama, prompt, "off")
    assert (cold(llama, prompt, later) - plain).abs().max() > 0.01, "this shows nothing"
    engine.prefill(prompt, "exact")
    torch.testing.assert_close(engine.prefill(prompt, later).logits, plain, **CLOSE)
    everything = PromptCacheEngine(llama, repair=1.0)
    everything.prefill(prompt, "balanced")
    torch.testing.assert_close(everything.prefill(prompt, later).logits, plain, **CLOSE)
