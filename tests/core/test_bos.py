"""A beginning-of-sequence token stands before every prompt, once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tiny_models
from pcache_core import CausalLM, Prompt, PromptCacheEngine, Segment

DOCUMENT = Segment("Ann keeps bees on a hill near Oslo.", "document")


@pytest.fixture(scope="module")
def engine(tiny_lm: Callable[..., CausalLM]) -> PromptCacheEngine:
    return PromptCacheEngine(tiny_lm("llama"), reuse="fast")


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ([Segment("<bos>Who?")], [Segment("Who?")]),
        ([Segment("<bos>Read:\n", "literal"), DOCUMENT], [Segment("Read:\n", "literal"), DOCUMENT]),
        ([Segment("<bos>"), DOCUMENT, Segment("\nWho?")], [DOCUMENT, Segment("\nWho?")]),
        ([Segment(""), Segment("<bos>"), Segment("Who?")], [Segment("Who?")]),
    ],
    ids=["text", "literal", "alone", "after nothing"],
)
def test_a_prompt_that_begins_with_it_gets_no_second(
    engine: PromptCacheEngine, written: list[Segment], plain: list[Segment]
) -> None:
    ids = engine.tokenise(Prompt(written)).token_ids
    assert ids == engine.tokenise(Prompt(plain)).token_ids
    assert ids.count(tiny_models.BOS) == 1
    prompts = [Prompt([*segments, Segment(" And?")]) for segments in (written, plain)]
    one, other = (engine.prefill(prompt) for prompt in prompts)
    torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-4)
    assert one.report.prompt_tokens == other.report.prompt_tokens


@pytest.mark.parametrize("kind", ["document", "argument"])
def test_one_that_data_spells_is_text_after_the_real_one(
    engine: PromptCacheEngine, kind: str
) -> None:
    prompt = Prompt([Segment("<bos>Who keeps bees?", kind)])  # type: ignore[arg-type]
    ids = engine.tokenise(prompt).token_ids
    assert ids[0] == tiny_models.BOS
    assert ids.count(tiny_models.BOS) == 1
    assert engine.lm.text.decode(ids).startswith("<bos>")


def test_a_second_one_that_was_meant_stays(engine: PromptCacheEngine) -> None:
    ids = engine.tokenise(Prompt.from_text("<bos><bos>Who?")).token_ids
    assert ids.count(tiny_models.BOS) == 2
