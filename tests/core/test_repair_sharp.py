"""What is repaired depends on the prompt and the policy alone, down to the last token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pcache_core import CausalLM, Prompt, PromptCacheEngine, Segment
from pcache_core.params import RepairPolicy, ReuseMode
from pcache_integrations.langchain import PromptCacheLLM

OPENING = Segment("Answer from the notes.\n", "literal")
BEES = Segment("Ann keeps bees in Oslo.", "document", "bees")
BOAT = Segment("Ben sold a red boat to a friend.", "document", "boat")
HOME = Segment("Cy is at home.", "document", "home")
MILL = Segment("The mill by the lake burned down.", "document", "mill")
LONG = Segment(
    "The old mill by the lake burned down last summer, and nobody was hurt then, they say.",
    "document",
    "long",
)
ALL_HEADS = RepairPolicy(head_tokens=10**6, query_ratio=0)
MODES: tuple[ReuseMode, ...] = ("balanced", "high")


def ask(question: str, *documents: Segment) -> Prompt:
    parts = [part for document in documents for part in (document, Segment("\n\n"))]
    return Prompt([OPENING, *parts, Segment(question, "argument")])


@pytest.fixture(scope="module")
def lm(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


@pytest.mark.parametrize("documents", [(BEES, BOAT, HOME, MILL), (BEES, LONG, HOME)])
def test_heads_as_long_as_documents_of_any_length_repair_everything(
    lm: CausalLM, documents: tuple[Segment, ...]
) -> None:
    prompt = ask("Who? A:", *documents)
    engine = PromptCacheEngine(lm)
    off = engine.prefill(prompt, "off").logits
    repaired = engine.prefill(prompt, repair=ALL_HEADS)
    assert repaired.report.repaired_tokens == sum(lm.count_tokens(d.text) for d in documents[1:])
    torch.testing.assert_close(repaired.logits, off, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_what_an_earlier_request_left_does_not_change_the_share(
    lm: CausalLM, mode: ReuseMode
) -> None:
    first, second = (ask(question, BOAT, MILL, BEES) for question in ("Who? A:", "Why so? A:"))
    fresh = PromptCacheEngine(lm).prefill(second, mode)
    engine = PromptCacheEngine(lm)
    engine.prefill(first, mode)
    again = engine.prefill(second, mode)
    assert again.report.repaired_tokens == fresh.report.repaired_tokens
    torch.testing.assert_close(again.logits, fresh.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_question_that_differs_in_its_last_token_is_another_question(
    lm: CausalLM, mode: ReuseMode
) -> None:
    first, second = (ask(question, BEES, BOAT, MILL) for question in ("Who? A:", "Who? A;"))
    fresh = PromptCacheEngine(lm).prefill(second, mode)
    engine = PromptCacheEngine(lm)
    engine.prefill(first, mode)
    other = engine.prefill(second, mode)
    assert other.report.repaired_tokens == fresh.report.repaired_tokens
    torch.testing.assert_close(other.logits, fresh.logits, rtol=0, atol=1e-4)


def test_a_response_cache_keeps_the_answers_of_two_policies_apart() -> None:
    few, many = (
        PromptCacheLLM(repair=RepairPolicy(head_tokens, 0.1))._identifying_params
        for head_tokens in (3, 9)
    )
    assert few != many
