"""Sequences of finished requests: what may be gone on from, for how long, and what never is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest
import torch

from pcache_core import (
    CausalLM,
    OptionError,
    Prompt,
    PromptCacheEngine,
    Report,
    SamplingParams,
    Segment,
)
from pcache_core.kv.key import ModuleKey, ModuleTokens, PlannedState
from pcache_core.prefix_cache import PrefixCache, whole_prefix
from pcache_core.prompt import Passage, TokenisedPrompt
from pcache_core.request import Request, check_request

STORY = "Ann keeps bees in Oslo, and Ben sold a red boat to a friend of hers."
LIMIT = SamplingParams(max_tokens=8, temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


@pytest.fixture
def engine(llama: CausalLM) -> PromptCacheEngine:
    return PromptCacheEngine(llama, reuse="exact")


def ask(engine: PromptCacheEngine, text: str) -> Report:
    return engine.prefill(Prompt.from_text(text)).report


def test_a_prompt_that_starts_alike_computes_only_what_follows(engine: PromptCacheEngine) -> None:
    first = ask(engine, STORY)
    assert first.cached_tokens == 0
    assert ask(engine, STORY).computed_tokens == 1  # for the logits
    longer = ask(engine, STORY + "\n?")
    assert longer.computed_tokens == longer.prompt_tokens - first.prompt_tokens


def test_a_short_common_start_is_copied_and_the_longer_sequence_stays(
    engine: PromptCacheEngine,
) -> None:
    ask(engine, STORY)
    begun_alike = ask(engine, STORY[:14] + "\n?")
    assert begun_alike.cached_tokens == 1 + engine.lm.count_tokens(STORY[:14])
    assert ask(engine, STORY + "\n").computed_tokens == 1


def test_what_is_copied_into_larger_buffers_gives_the_same_logits(
    llama: CausalLM, engine: PromptCacheEngine
) -> None:
    ask(engine, STORY)
    longer = Prompt.from_text(STORY + "\nand so on" * 30)
    found = engine.prefill(longer)
    assert found.report.cached_tokens == 1 + llama.count_tokens(STORY)
    fresh = PromptCacheEngine(llama, reuse="off").prefill(longer)
    torch.testing.assert_close(found.logits, fresh.logits, rtol=0, atol=1e-4)


def test_a_sequence_at_work_is_given_to_no_other_request(engine: PromptCacheEngine) -> None:
    bees = STORY[:23]
    ask(engine, bees)
    stream = engine.stream(Prompt.from_text(bees), LIMIT)
    with closing(stream):
        next(stream)
        assert ask(engine, bees).cached_tokens == 0
    assert ask(engine, bees).computed_tokens == 1


def test_a_request_that_failed_leaves_nothing_to_go_on_from(engine: PromptCacheEngine) -> None:
    failing = engine.lm.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with failing, pytest.raises(ZeroDivisionError):
        ask(engine, STORY)
    assert ask(engine, STORY).cached_tokens == 0
    assert engine.kv_bytes() == 0


# Budget: a prompt of up to 64 tokens takes buffers of 64 rows.


def texts(count: int) -> list[str]:
    return [f"{number}: the river runs past mill {number}." for number in range(count)]


def is_kept(engine: PromptCacheEngine, text: str) -> bool:
    return ask(engine, text).computed_tokens == 1


@pytest.mark.parametrize("sequences", [1, 3, 5])
def test_prefixes_are_kept_up_to_their_budget_in_bytes_and_the_oldest_go_first(
    llama: CausalLM, sequences: int
) -> None:
    budget = sequences * 64 * llama.bytes_per_token
    asked = texts(7)
    for number in range(7):
        # What is found when it is asked for is used, which would change what goes next.
        engine = PromptCacheEngine(llama, reuse="exact", prefix_budget_bytes=budget)
        for text in asked:
            ask(engine, text)
        assert is_kept(engine, asked[number]) == (number >= 7 - sequences)


def test_the_last_sequence_is_kept_whatever_its_size(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, reuse="exact", prefix_budget_bytes=0)
    ask(engine, "Once.")
    ask(engine, STORY)
    assert ask(engine, STORY + "\n").computed_tokens == 1


def test_what_was_used_last_stays_when_room_is_needed(llama: CausalLM) -> None:
    budget = 3 * 64 * llama.bytes_per_token
    engine = PromptCacheEngine(llama, reuse="exact", prefix_budget_bytes=budget)
    first, second, third, fourth = texts(4)
    for text in (first, second, third, first, fourth):
        ask(engine, text)
    assert is_kept(engine, first)
    assert not is_kept(engine, second)


def test_the_last_four_are_not_the_limit(engine: PromptCacheEngine) -> None:
    asked = texts(9)
    for text in asked:
        ask(engine, text)
    assert all(is_kept(engine, text) for text in asked)


def test_a_sequence_that_was_emptied_gives_its_memory_to_the_next(llama: CausalLM) -> None:
    prompt, params = Prompt.from_text(STORY), SamplingParams(max_tokens=1)
    tokens = PromptCacheEngine(llama).tokenise(prompt)
    request = check_request(llama, tokens, prompt, params, "off", None)
    cache = PrefixCache(llama, 2**30)
    lent = []
    for _ in range(3):
        with cache.sequence(request) as sequence:
            sequence.append(tokens.token_ids[0], 0)
            sequence.is_filled = True
            lent.append(sequence.buffers)
    assert len(set(map(id, lent))) == 1


@pytest.mark.parametrize("budget", [-1, 1.5, "1", True])
def test_a_budget_is_a_number_of_bytes(llama: CausalLM, budget: object) -> None:
    with pytest.raises(OptionError, match="prefix_budget_bytes=.*must be an integer, 0 or more"):
        PromptCacheEngine(llama, prefix_budget_bytes=budget)  # type: ignore[arg-type]


# Modules: a prefix that is taken over ends within none.


def planned(*runs: tuple[int, int], is_opening: bool = False) -> PlannedState:
    passage = Passage(tuple(range(sum(stop - start for start, stop in runs))))
    key = ModuleKey("0" * 64, passage.token_ids)
    positions = tuple(start for start, _ in runs)
    return PlannedState(ModuleTokens(passage, (), 0), key, runs, positions, is_opening)


def request(*states: PlannedState) -> Request:
    tokens = TokenisedPrompt((), (), (), 0, 0)
    return Request(tokens, SamplingParams(), "fast", None, None, states)


@pytest.mark.parametrize(
    ("held", "whole"),
    [(3, 3), (5, 3), (8, 8), (10, 8), (13, 8), (16, 8), (19, 8), (20, 20)],
)
def test_a_cut_module_is_left_out_and_what_that_cuts_as_well(held: int, whole: int) -> None:
    # Rows 3-8 are one module; 8-11 and 14-17, 11-14 and 17-20 are two that cross.
    modules = [planned((3, 8)), planned((8, 11), (14, 17)), planned((11, 14), (17, 20))]
    assert whole_prefix(request(*modules), held) == whole


def test_a_module_that_ends_where_the_prefix_does_is_whole() -> None:
    assert whole_prefix(request(planned((3, 8)), planned((11, 14), (17, 20))), 11) == 11


@pytest.mark.parametrize(("held", "whole"), [(9, 0), (10, 10), (19, 19), (20, 20), (25, 20)])
def test_an_opening_is_kept_in_part_if_that_is_half_of_it(held: int, whole: int) -> None:
    # Below that, its state saves more than the rows that are there.
    states = [planned((0, 20), is_opening=True), planned((20, 40))]
    assert whole_prefix(request(*states), held) == whole


def test_a_document_that_an_earlier_prompt_held_in_part_is_not_gone_on_from(
    llama: CausalLM,
) -> None:
    bees = "Ann keeps bees in Oslo."
    engine = PromptCacheEngine(llama, reuse="fast")
    ask(engine, "From:\n" + bees[:12])
    prompt = Prompt([Segment("From:\n"), Segment(bees, "document"), Segment("\nWho?")])
    found = engine.prefill(prompt)
    assert [part.source for part in found.report.segments] == ["prefix", "encoded", "computed"]
    fresh = PromptCacheEngine(llama, reuse="fast").prefill(prompt)
    torch.testing.assert_close(found.logits, fresh.logits, rtol=0, atol=1e-4)
