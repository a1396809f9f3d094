"""What a request gets does not depend on what was asked before, save where it continues it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcache_core import (
    CausalLM,
    ContextLengthError,
    ModelError,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)
from pcache_core.params import ReuseMode

TOLERANCE = 1e-4
Way = tuple[ReuseMode, float | None]
"""A mode and what it repairs: less than half of these prompts, where all would be computed."""
FAST: Way = ("fast", None)
BALANCED: Way = ("balanced", 8)
HIGH: Way = ("high", 0.25)
EXACT: Way = ("exact", None)
WAYS = (FAST, BALANCED, HIGH)
all_ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way[0])
repairing_ways = pytest.mark.parametrize("way", [BALANCED, HIGH], ids=lambda way: way[0])
OPENING = Segment("Answer from the notes.\n", "literal")
BEES = Segment("Ann keeps bees in Oslo.", "document", "bees")
BOAT = Segment("Ben sold a red boat to a friend.", "document", "boat")
MILL = Segment("The mill by the lake burned down.", "document", "mill")
CARD = Segment("Cy wrote a card to Ann.", "document", "card")


def ask(question: str, *documents: Segment) -> Prompt:
    return Prompt([OPENING, *documents, Segment(question, "argument")])


PROMPTS = (
    ask("\nWho? A:", BEES, BOAT, MILL),
    ask("\nWhy is that? A:", BEES, BOAT, MILL),
    ask("\nWho? A:", MILL, BEES, BOAT),
)
Asked = tuple[Way, int]
"""A way and which of `PROMPTS`."""


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def fresh(llama: CausalLM) -> dict[Asked, torch.Tensor]:
    """Logits of every way and prompt, each from an engine that was asked nothing before."""
    return {
        (way, index): PromptCacheEngine(llama).prefill(prompt, *way).logits
        for way in (*WAYS, EXACT)
        for index, prompt in enumerate(PROMPTS)
    }


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) < TOLERANCE


def test_the_modes_differ_on_these_prompts(fresh: dict[Asked, torch.Tensor]) -> None:
    for index in range(len(PROMPTS)):
        for one, other in itertools.pairwise((EXACT, *WAYS)):
            assert not alike(fresh[one, index], fresh[other, index])


ASKED = st.tuples(st.sampled_from(WAYS), st.integers(0, len(PROMPTS) - 1))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(ASKED, min_size=2, max_size=8))
def test_modes_that_reuse_states_give_what_a_fresh_engine_gives(
    llama: CausalLM, fresh: dict[Asked, torch.Tensor], asked: list[Asked]
) -> None:
    engine = PromptCacheEngine(llama)
    for way, index in asked:
        assert alike(engine.prefill(PROMPTS[index], *way).logits, fresh[way, index])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(ASKED, max_size=6), st.integers(0, len(PROMPTS) - 1))
def test_exact_gives_what_off_gives_whatever_was_asked_before(
    llama: CausalLM, fresh: dict[Asked, torch.Tensor], asked: list[Asked], index: int
) -> None:
    engine = PromptCacheEngine(llama)
    for way, before in asked:
        engine.prefill(PROMPTS[before], *way)
    exact = engine.prefill(PROMPTS[index], "exact")
    assert alike(exact.logits, engine.prefill(PROMPTS[index], "off").logits)
    assert alike(exact.logits, fresh[EXACT, index])


@all_ways
def test_an_exact_prefix_is_better_than_any_state(
    llama: CausalLM, fresh: dict[Asked, torch.Tensor], way: Way
) -> None:
    engine = PromptCacheEngine(llama)
    engine.prefill(PROMPTS[0], "exact")
    for index in (0, 1):  # the same documents in the same order, all of them exact
        prefill = engine.prefill(PROMPTS[index], *way)
        assert alike(prefill.logits, fresh[EXACT, index])
        assert prefill.report.repaired_tokens == 0


@repairing_ways
@pytest.mark.parametrize("between", [(), ((FAST, 2),), ((HIGH, 2), (BALANCED, 2))])
def test_the_very_same_prompt_is_repaired_once(
    llama: CausalLM, way: Way, between: tuple[Asked, ...]
) -> None:
    engine = PromptCacheEngine(llama)
    first = engine.generate(PROMPTS[0], SamplingParams(max_tokens=5), *way)
    for other, index in between:
        engine.prefill(PROMPTS[index], *other)
    before = PromptCacheEngine(llama).prefill(PROMPTS[0], *way)
    again = engine.prefill(PROMPTS[0], *way)
    assert first.report.repaired_tokens == before.report.repaired_tokens > 0
    assert again.report.repaired_tokens == 0
    assert again.report.computed_tokens == 1
    assert alike(again.logits, before.logits)


@repairing_ways
def test_a_prompt_that_goes_on_keeps_what_was_repaired(llama: CausalLM, way: Way) -> None:
    longer = Prompt([*PROMPTS[0].segments, Segment(" Ann.\n"), CARD, Segment("\nWhere? A:")])
    served = {}
    for used in (way, EXACT):
        engine = PromptCacheEngine(llama)
        first = engine.prefill(PROMPTS[0], *used)
        report = engine.prefill(longer, *used).report
        served[used] = report.cached_tokens
        assert {s.source for s in report.segments if s.name in ("bees", "boat")} == {"prefix"}
    assert served[way] >= served[EXACT] >= first.report.prompt_tokens - 1
    fresh = PromptCacheEngine(llama).prefill(longer, *way).report
    assert fresh.cached_tokens < served[way]


def test_all_of_it_repaired_is_full_prefill_in_every_turn(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, repair=1.0)
    prompt = ask("\nWho? A:", BEES, BOAT)
    for document in (MILL, BOAT, BEES):
        off = PromptCacheEngine(llama).prefill(prompt, "off")
        prefill = engine.prefill(prompt)
        assert alike(prefill.logits, off.logits)
        assert not any(part.preamble_tokens for part in prefill.report.segments)
        prompt = Prompt([*prompt.segments, Segment(" Ann.\n"), document, Segment("\nWhere? A:")])


@pytest.mark.parametrize("budget", [8, 24, 0.2], ids=["fewer", "more", "a share"])
def test_another_budget_does_not_go_on_from_what_one_repaired(
    llama: CausalLM, budget: float
) -> None:
    fresh = PromptCacheEngine(llama).prefill(PROMPTS[0], repair=budget)
    engine = PromptCacheEngine(llama, repair=16)
    engine.prefill(PROMPTS[0])
    prefill = engine.prefill(PROMPTS[0], repair=budget)
    assert prefill.report.repaired_tokens == fresh.report.repaired_tokens > 0
    assert alike(prefill.logits, fresh.logits)


@pytest.mark.parametrize("way", [*WAYS, EXACT], ids=lambda way: way[0])
def test_threads_get_the_logits_they_would_get_alone(
    llama: CausalLM, fresh: dict[Asked, torch.Tensor], way: Way
) -> None:
    engine = PromptCacheEngine(llama, reuse=way[0], repair=way[1])

    def work(worker: int) -> None:
        for turn in range(6):
            index = (worker + turn) % len(PROMPTS)
            assert alike(engine.prefill(PROMPTS[index]).logits, fresh[way, index])

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    assert len(engine.reports) == 36


def test_streams_of_repaired_prompts_that_interleave_stay_apart(llama: CausalLM) -> None:
    params = SamplingParams(max_tokens=8)
    alone = [PromptCacheEngine(llama, repair=8) for _ in PROMPTS]
    pairs = zip(alone, PROMPTS, strict=True)
    expected = [engine.generate(prompt, params).text for engine, prompt in pairs]
    assert all(engine.reports[-1].repaired_tokens == 8 for engine in alone)
    engine = PromptCacheEngine(llama, repair=8)
    rounds = itertools.zip_longest(*(engine.stream(prompt, params) for prompt in PROMPTS))
    texts = [""] * len(PROMPTS)
    for chunks in rounds:
        for index, chunk in enumerate(chunks):
            texts[index] += chunk.text if chunk else ""
    assert texts == expected


def test_a_prefix_that_holds_only_the_start_of_the_opening_does_not_keep_its_state_out(
    llama: CausalLM,
) -> None:
    writer = PromptCacheEngine(llama, reuse="fast")
    writer.prefill(ask("\nWho? A:", BEES))
    engine = PromptCacheEngine(llama, writer.store, "fast")
    other = Segment("Answer in one word.\n", "literal")
    engine.prefill(Prompt([other, MILL, Segment("\nWho? A:")]))
    found = engine.prefill(ask("\nWho? A:", BEES)).report
    assert [segment.source for segment in found.segments] == ["memory", "memory", "computed"]


@pytest.mark.parametrize("mode", ["off", "exact", "fast"])
def test_a_continuation_is_as_likely_as_one_token_after_the_other(
    llama: CausalLM, mode: ReuseMode
) -> None:
    """Each of its tokens, written at the end of the prompt, is what the next is asked after."""
    ids = [llama.token_ids(letter)[0] for letter in "xyz"]
    prefill = PromptCacheEngine(llama).prefill(PROMPTS[0], mode, continuation=ids)
    segments, expected = list(PROMPTS[0].segments), []
    for token_id, letter in zip(ids, "xyz", strict=True):
        logits = PromptCacheEngine(llama).prefill(Prompt(segments), mode).logits
        expected.append(float(logits.log_softmax(-1)[token_id]))
        segments.append(Segment(letter, "argument"))
    assert prefill.logprobs == pytest.approx(expected, abs=TOLERANCE)
    assert alike(prefill.logits, PromptCacheEngine(llama).prefill(PROMPTS[0], mode).logits)


def test_a_continuation_that_has_no_room_or_no_such_token_is_refused(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama)  # 512 tokens
    room = 512 - len(engine.tokenise(PROMPTS[0]).token_ids) + 1
    assert len(engine.prefill(PROMPTS[0], continuation=[5] * room).logprobs) == room
    with pytest.raises(ContextLengthError, match=rf"has {room + 1} tokens, .* room for {room}"):
        engine.prefill(PROMPTS[0], continuation=[5] * (room + 1))
    with pytest.raises(ModelError, match="id 100000"):
        engine.prefill(PROMPTS[0], continuation=[100_000])
    assert engine.prefill(PROMPTS[0]).logprobs == ()
