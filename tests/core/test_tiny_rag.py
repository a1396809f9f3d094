"""The built-in model answers right from reused states, whatever the documents' order."""

from __future__ import annotations

import random

import pytest

from corpus import DOCUMENTS, OPENING, QUESTIONS
from pcache_core import CausalLM, Prompt, PromptCacheEngine, SamplingParams, Segment

SHORT_ANSWER = SamplingParams(max_tokens=24, stop=["\n"])


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return CausalLM.from_pretrained("builtin:tiny-rag")


def make_prompt(documents: list[str], question: str) -> Prompt:
    """All documents and a question, as the model was trained to read them."""
    parts = [Segment(OPENING, "literal")]
    for number, text in enumerate(documents):
        parts += [Segment(text, "document", f"d{number}"), Segment("\n\n", "text")]
    return Prompt(
        [
            *parts,
            Segment("Question:", "literal"),
            Segment(f" {question}", "argument"),
            Segment("\nAnswer:", "literal"),
        ]
    )


@pytest.mark.parametrize("reuse", ["off", "exact", "fast"])
@pytest.mark.parametrize("seed", range(4))
def test_eight_documents_in_any_order_give_the_right_answers(
    lm: CausalLM, reuse: str, seed: int
) -> None:
    engine = PromptCacheEngine(lm, reuse=reuse)  # type: ignore[arg-type]
    rng = random.Random(seed)
    for question, (answer, _) in QUESTIONS.items():
        prompt = make_prompt(rng.sample(DOCUMENTS, len(DOCUMENTS)), question)
        assert engine.generate(prompt, SHORT_ANSWER).text.strip() == answer


@pytest.mark.parametrize("ahead", [True, False], ids=["encoded ahead", "at first use"])
def test_documents_are_reused_whole_on_the_second_pass_but_one_that_never_came_first(
    lm: CausalLM, *, ahead: bool
) -> None:
    engine = PromptCacheEngine(lm, reuse="fast")
    if ahead:
        engine.encode(DOCUMENTS, progress=False)
    rng = random.Random(7)
    for number in range(2):
        for question in QUESTIONS:
            prompt = make_prompt(rng.sample(DOCUMENTS, len(DOCUMENTS)), question)
            report = engine.generate(prompt, SHORT_ANSWER).report
            first, *others = [part.source for part in report.segments if part.kind == "document"]
            if ahead or number:
                assert set(others) <= {"prefix", "memory"}
                assert first in ({"prefix", "memory"} if ahead else {"prefix", "memory", "encoded"})


def test_wrong_documents_give_no_answer(lm: CausalLM) -> None:
    engine = PromptCacheEngine(lm, reuse="fast")
    for question, (answer, needed) in QUESTIONS.items():
        others = [text for number, text in enumerate(DOCUMENTS) if number not in needed]
        answers = engine.generate(make_prompt(others, question), SHORT_ANSWER).text.strip()
        assert answers != answer
