"""Prompt lookup: several tokens in a forward, and the answers of one token a forward.

The oracle is plain decoding, `speculative=False`. Random models hardly quote, so a repetition
penalty below 1 makes them say again what they have read: of their drafts, many are right and many
are wrong.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny_models
from pcache_core import (
    CausalLM,
    Generation,
    Grammar,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)
from pcache_core.decode import Decoder
from pcache_core.lookup import PromptLookup
from pcache_core.params import ReuseMode

DOCUMENTS = [
    "Ann keeps bees in Oslo, on the hill behind the old station.",
    "Ben sold a red boat to a friend of hers, who painted it green.",
    "In winter the ferry goes at seven, at noon and once more at nine.",
]
TEXT = Prompt.from_text("bees bees bees")
REPEATING = SamplingParams(max_tokens=40, repetition_penalty=0.3)


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama", seed=1)


@pytest.fixture(scope="module")
def engine(llama: CausalLM) -> PromptCacheEngine:
    return PromptCacheEngine(llama, reuse="exact")


def both(
    engine: PromptCacheEngine, params: SamplingParams, prompt: Prompt = TEXT
) -> tuple[Generation, Generation]:
    """An answer of one token a forward, and the same with drafts."""
    plain = engine.generate(prompt, replace(params, speculative=False))
    assert plain.report.drafted_tokens == 0
    return plain, engine.generate(prompt, params)


def same(one: Generation, other: Generation) -> bool:
    return (one.text, one.token_ids, one.finish_reason) == (
        other.text, other.token_ids, other.finish_reason,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*documents can't be reused")
@pytest.mark.parametrize(
    "name",
    [
        "llama", "llama/dynamic-beyond", "mistral/sliding", "gemma3", "gpt_oss", "gpt2", "mpt",
        "deepseek_v3", "mixtral", "llama4", "jamba",
    ],
)  # fmt: skip
def test_an_answer_with_drafts_is_that_of_one_token_a_forward(
    tiny_lm: Callable[..., CausalLM], name: str
) -> None:
    engine = PromptCacheEngine(tiny_lm(name, seed=1), reuse="exact")
    drafted = accepted = 0
    for text in ("bees bees bees", "Ann keeps bees in Oslo."):
        plain, found = both(engine, replace(REPEATING, logprobs=2), Prompt.from_text(text))
        assert same(plain, found)
        pairs = zip(plain.logprobs, found.logprobs, strict=True)
        assert all(abs(one.logprob - other.logprob) < 1e-4 for one, other in pairs)
        drafted += found.report.drafted_tokens
        accepted += found.report.accepted_tokens
    if name == "jamba":  # its state is not rows, so nothing could be taken back
        assert drafted == 0
    else:
        assert 0 < accepted < drafted


@pytest.mark.parametrize("seed", range(4))
def test_a_sampled_answer_has_the_same_tokens(engine: PromptCacheEngine, seed: int) -> None:
    plain, found = both(engine, replace(REPEATING, temperature=1.0, top_p=0.9, seed=seed))
    assert same(plain, found)
    assert found.report.drafted_tokens > 0


def test_an_answer_may_end_anywhere_in_a_draft(engine: PromptCacheEngine) -> None:
    whole = engine.generate(TEXT, REPEATING)
    assert whole.report.accepted_tokens > 3
    for count in range(2, REPEATING.max_tokens, 3):
        ends: list[dict[str, Any]] = [
            {"max_tokens": count},
            {"stop_token_ids": [whole.token_ids[count]]},
            {"stop": [whole.text[count : count + 3] or "none"]},
        ]
        for end in ends:
            assert same(*both(engine, replace(REPEATING, **end))), end


def test_drafts_end_where_the_context_does(tiny_lm: Callable[..., CausalLM]) -> None:
    lm = tiny_lm("gpt2", seed=1)
    assert lm.context_length is not None
    prompt = Prompt.from_text("e" * (lm.context_length - 24))  # the model has no later positions
    plain, found = both(PromptCacheEngine(lm), REPEATING, prompt)
    assert same(plain, found)
    assert found.finish_reason == "length"
    assert found.report.accepted_tokens > 0


def test_an_answer_that_must_quote_is_drafted(engine: PromptCacheEngine) -> None:
    quotations = {"type": "array", "items": {"enum": DOCUMENTS}, "minItems": 3, "maxItems": 3}
    prompt = Prompt.from_text("\n".join(DOCUMENTS))
    params = SamplingParams(max_tokens=250, grammar=Grammar.json(quotations))
    plain, found = both(engine, params, prompt)
    assert same(plain, found)
    assert found.report.accepted_tokens > len(found.token_ids) / 2


@pytest.mark.parametrize("mode", ["exact", "fast", "balanced"])
def test_what_comes_after_a_stream_that_was_left_is_not_changed_by_its_drafts(
    llama: CausalLM, mode: ReuseMode
) -> None:
    documents = [Segment(text, "document") for text in DOCUMENTS]
    prompt = Prompt([Segment("Read.\n"), *documents, Segment("\nSay it again:")])
    for count in (3, 8, 20, 40):
        logits = []
        for params in (REPEATING, replace(REPEATING, speculative=False)):
            engine = PromptCacheEngine(llama, reuse=mode, repair=6 if mode == "balanced" else None)
            stream = engine.stream(prompt, params)
            ids = [next(stream).token_ids[0] for _ in range(count)]
            stream.close()
            said = llama.text.decode(ids)
            later = Prompt([*prompt.segments, Segment(said), Segment("\nAnd then?")])
            logits.append(engine.prefill(later).logits)
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_requests_at_once_have_their_own_answers(llama: CausalLM, mode: ReuseMode) -> None:
    """In `fast` they have their documents on loan from each other."""
    engine = PromptCacheEngine(llama, reuse=mode)
    turns = [[*DOCUMENTS[i:], *DOCUMENTS[:i]] for i in range(3)]
    prompts = [
        Prompt([*(Segment(text, "document") for text in turn), Segment(f"\n{i}")])
        for i, turn in enumerate(turns)
    ]
    expected = [both(engine, REPEATING, prompt)[0] for prompt in prompts]
    begin = threading.Barrier(3)

    def ask(prompt: Prompt) -> Generation:
        begin.wait()
        return engine.generate(prompt, REPEATING)

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(ask, prompts))
    assert all(map(same, expected, found))
    assert sum(answer.report.accepted_tokens for answer in found) > 0


@pytest.mark.parametrize(("running", "longest"), [(1, 15), (4, 7), (8, 3), (9, 0)])
def test_many_requests_draft_less_each(llama: CausalLM, running: int, longest: int) -> None:
    sizes = []
    again = 2 * llama.token_ids(DOCUMENTS[0])

    def note(module: object, given: Any, named: dict[str, Any]) -> None:
        sizes.append(named["input_ids"].shape[1])

    engine = PromptCacheEngine(llama)
    with engine._prefix_cache.sequence(engine._check(TEXT, REPEATING, "off", None)) as sequence:
        decoder = Decoder(llama, sequence, SamplingParams(max_tokens=200), lambda: running)
        with llama.model.register_forward_pre_hook(note, with_kwargs=True):
            for token_id in again:
                decoder(token_id)
    assert max(sizes) == 1 + longest


def test_in_bfloat16_answers_part_only_where_the_two_best_tokens_are_close() -> None:
    gaps = []
    for name in ("llama", "gpt2"):
        model = tiny_models.build(name, seed=1).bfloat16()
        engine = PromptCacheEngine(CausalLM(model, tiny_models.tiny_tokenizer()), reuse="off")
        for text in DOCUMENTS:
            params = SamplingParams(max_tokens=48, logprobs=2)
            plain, found = both(engine, params, Prompt.from_text(text))
            parting = [a != b for a, b in zip(plain.token_ids, found.token_ids, strict=False)]
            if any(parting):
                best, second = plain.logprobs[parting.index(True)].top
                gaps.append(best.logprob - second.logprob)
    assert len(gaps) <= 1
    assert all(gap < 0.1 for gap in gaps), gaps  # rounding to bfloat16 moves a logit of 12 by 0.03


def quotation(ids: Sequence[int], count: int) -> list[int]:
    """What followed the last three tokens, or else the last two, where they came last before."""
    for length in (3, 2):
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == ids[-length:]:
                said = list(ids)
                for at in range(start + length, start + length + count):
                    said.append(said[at])
                return said[len(ids) :]
    return []


def test_a_draft_is_what_followed_the_last_tokens_before() -> None:
    chance = random.Random(1)
    for count in range(60):
        ids = [chance.randrange(4) for _ in range(count)]
        lookup = PromptLookup(ids[: count // 2])
        for token_id in ids[count // 2 :]:
            lookup.add(token_id)
        assert lookup.draft(4) == quotation(ids, 4)
        assert lookup.draft(0) == []


def test_drafts_grow_while_they_are_right() -> None:
    text = list(range(100))
    lookup, lengths = PromptLookup([*text, 0, 1]), []
    said = 2
    while said + 16 < len(text):
        draft = lookup.draft(99)
        lengths.append(len(draft))
        for token_id in text[said : said + len(draft) + 1]:
            lookup.add(token_id)
        said += len(draft) + 1
    assert lengths[:4] == [4, 8, 15, 15]


def test_drafts_pause_while_they_are_wrong() -> None:
    lookup, drafted = PromptLookup(range(10)), 0
    for turn in range(200):
        for token_id in (0, 1):  # never goes on as before
            lookup.add(token_id)
        drafted += bool(lookup.draft(99))
        lookup.add(100 + turn)
    assert 5 < drafted < 20
