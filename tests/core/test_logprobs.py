"""Log probabilities are those of a plain forward of transformers, whatever the sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny_models
from pcache_core import CausalLM, OptionError, Prompt, PromptCacheEngine, SamplingParams

TEXT = "Ann keeps bees in Oslo. Ben sold a red boat. Who?"
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "seed": 3},
    "penalised": {"repetition_penalty": 3.0},
}


@pytest.fixture(scope="module")
def engine(tiny_lm: Callable[..., CausalLM]) -> PromptCacheEngine:
    return PromptCacheEngine(tiny_lm("llama", seed=1), reuse="exact")


def expected(engine: PromptCacheEngine, answer: tuple[int, ...]) -> torch.Tensor:
    """[tokens, vocab]: one forward of an unmodified model over the prompt and the answer."""
    prompt = engine.lm.tokenizer(TEXT)["input_ids"]
    model = tiny_models.build("llama", seed=1)
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), dim=-1)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_logprobs_are_those_of_a_plain_forward(
    engine: PromptCacheEngine, sampling: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=12, logprobs=4, **sampling)
    answer = engine.generate(Prompt.from_text(TEXT), params)
    rows = expected(engine, answer.token_ids)
    assert [record.token_id for record in answer.logprobs] == list(answer.token_ids)
    for record, row in zip(answer.logprobs, rows, strict=True):
        values, ids = row.topk(4)
        assert record.logprob == pytest.approx(float(row[record.token_id]), abs=1e-4)
        assert [other.token_id for other in record.top] == ids.tolist()
        assert [other.logprob for other in record.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_the_texts_of_the_tokens_join_to_the_answer(engine: PromptCacheEngine) -> None:
    # The random model writes bytes that are often no characters.
    params = SamplingParams(max_tokens=60, temperature=1.5, seed=7, logprobs=0)
    answer = engine.generate(Prompt.from_text(TEXT), params)
    joined = "".join(record.token for record in answer.logprobs)
    assert answer.text.startswith(joined)
    assert len(joined) > len(answer.text) - 4  # characters that the end has cut
    assert all(record.top == () for record in answer.logprobs)


def test_every_chunk_has_the_logprobs_of_its_tokens(engine: PromptCacheEngine) -> None:
    params = SamplingParams(max_tokens=8, logprobs=1, stop=["\x00"])
    for chunk in engine.stream(Prompt.from_text(TEXT), params):
        assert [record.token_id for record in chunk.logprobs] == list(chunk.token_ids)


def test_nobody_who_has_not_asked_gets_logprobs(engine: PromptCacheEngine) -> None:
    answer = engine.generate(Prompt.from_text(TEXT), SamplingParams(max_tokens=3))
    assert answer.logprobs == ()


async def test_async_answers_have_them_too(engine: PromptCacheEngine) -> None:
    params = SamplingParams(max_tokens=3, logprobs=2)
    answer = await engine.agenerate(Prompt.from_text(TEXT), params)
    again = engine.generate(Prompt.from_text(TEXT), params)
    assert [r.token_id for r in answer.logprobs] == [r.token_id for r in again.logprobs]


@pytest.mark.parametrize("logprobs", [-1, 21, 1.5, True, "5"])
def test_an_impossible_number_of_alternatives_is_refused(logprobs: Any) -> None:
    with pytest.raises(OptionError, match="logprobs"):
        SamplingParams(logprobs=logprobs)
