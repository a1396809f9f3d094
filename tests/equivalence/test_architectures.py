"""Reused states give the logits of one masked forward, on every architecture or with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import oracle
import tiny_models
from pcache_core import (
    CausalLM,
    Preamble,
    Prefill,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)
from subjects import (
    BEES,
    BOAT,
    CROWDED,
    DIVERSE,
    EXACT_ONLY,
    FIRST,
    FIXED,
    LAST,
    LONGER,
    MILL,
    MODULES,
    NO_CACHE,
    OPENING,
    REUSING,
    SECOND,
    SHORT,
    TOLERANCE,
    TOO_LONG,
    VERDICTS,
    VISIBLE_DIFFERENCE,
    Subject,
    error,
    make_subject,
    module_tokens,
)

WEIGHTS = [(name, seed) for name in REUSING for seed in (0, 1)]


@pytest.fixture(scope="module", params=tiny_models.ARCHITECTURES)
def subject(request: pytest.FixtureRequest, tiny_lm: Callable[..., CausalLM]) -> Subject:
    """Every architecture."""
    return make_subject(request.param, 0, tiny_lm)


@pytest.fixture(scope="module", params=WEIGHTS, ids=lambda param: f"{param[0]}-{param[1]}")
def reusing(request: pytest.FixtureRequest, tiny_lm: Callable[..., CausalLM]) -> Subject:
    """Every architecture whose documents can be reused, with several weights."""
    return make_subject(*request.param, tiny_lm)


def starts(rows: oracle.Rows) -> list[int]:
    """Position of each module's first token, by the module's ids."""
    modules: dict[int, list[oracle.Row]] = {}
    for row in rows:
        if row.role == "module":
            modules.setdefault(row.group, []).append(row)
    by_ids = {tuple(row.token_id for row in part): part[0].position for part in modules.values()}
    return [by_ids[ids] for ids in sorted(by_ids)]


def module_sources(prefill: Prefill) -> set[str]:
    return {part.source for part in prefill.report.segments if part.name in MODULES}


def test_self_test_finds_what_the_model_can_do(subject: Subject) -> None:
    support = subject.lm.support
    assert support.kind == VERDICTS[subject.name], support.reason
    assert bool(support.reason) == (support.kind not in ("relocatable", "position-free"))


def test_new_states_give_the_logits_of_one_masked_forward(reusing: Subject) -> None:
    prefill = reusing.engine().prefill(FIRST)
    assert prefill.report.fallback_reason is None
    assert module_sources(prefill) == {"encoded"}
    assert error(prefill, reusing.expected(FIRST)) < TOLERANCE


def test_states_in_another_order_give_the_logits_of_one_masked_forward(reusing: Subject) -> None:
    before, after = starts(reusing.rows(FIRST)), starts(reusing.rows(SECOND))
    assert len(before) == len(MODULES)
    assert all(old != new for old, new in zip(before, after, strict=True))
    engine = reusing.engine()
    engine.prefill(FIRST)
    prefill = engine.prefill(SECOND)
    assert prefill.report.fallback_reason is None
    assert error(prefill, reusing.expected(SECOND)) < TOLERANCE
    if reusing.name in FIXED:
        assert module_sources(prefill) == {"encoded"}
        assert prefill.report.cached_tokens > 0  # the opening
    else:  # the boat comes first now, and the bees did before
        sources = {part.name: part.source for part in prefill.report.segments}
        assert (sources["boat"], sources["bees"], sources["mill"]) == (
            "encoded",
            "encoded",
            "memory",
        )
        assert module_sources(engine.prefill(FIRST)) <= {"memory", "prefix"}


def test_a_crowded_prompt_gives_the_logits_of_one_masked_forward(reusing: Subject) -> None:
    engine = reusing.engine()
    engine.prefill(FIRST)
    prefill = engine.prefill(CROWDED)
    sources = [part.source for part in prefill.report.segments]
    again = "encoded" if reusing.name in FIXED else "memory"
    assert sources == ["encoded", "encoded", again, "computed", "computed"]
    assert reusing.lm.count_tokens(LAST.text) >= engine.min_module_tokens
    assert error(prefill, reusing.expected(CROWDED)) < TOLERANCE


def test_a_prefix_that_holds_states_is_continued(reusing: Subject) -> None:
    engine = reusing.engine()
    engine.prefill(FIRST)
    prefill = engine.prefill(LONGER)
    assert module_sources(prefill) == {"prefix"}
    assert error(prefill, reusing.expected(LONGER)) < TOLERANCE


@pytest.mark.parametrize("name", FIXED)
def test_a_state_at_fixed_positions_serves_in_its_place_only(
    name: str, tiny_lm: Callable[..., CausalLM]
) -> None:
    subject = make_subject(name, 0, tiny_lm)
    engine = subject.engine()
    engine.prefill(FIRST)
    # Another first document of as many tokens: what follows it stands where it stood.
    other = Segment(BEES.text.replace("k", "z"), "document", name="other")
    same_places = Prompt([OPENING, other, *FIRST.segments[2:]])
    prefill = engine.prefill(same_places)
    sources = {part.name: part.source for part in prefill.report.segments}
    assert sources["other"] == "encoded"
    assert sources["mill"] == sources["boat"] == "memory"
    assert error(prefill, subject.expected(same_places)) < TOLERANCE


def test_the_masked_forward_is_not_the_plain_one(reusing: Subject) -> None:
    for prompt in (FIRST, SECOND, CROWDED):
        plain = oracle.next_logits(reusing.twin(), oracle.without_modules(reusing.rows(prompt)))
        assert (reusing.expected(prompt) - plain).abs().max() > VISIBLE_DIFFERENCE


def test_the_oracle_without_modules_is_the_models_own_forward(reusing: Subject) -> None:
    rows = oracle.without_modules(reusing.rows(SECOND))
    own = oracle.stock_logits(reusing.twin(), oracle.token_ids(rows))
    assert (oracle.next_logits(reusing.twin(), rows) - own).abs().max() < TOLERANCE / 10


def test_off_is_the_models_own_forward(subject: Subject) -> None:
    engine = subject.engine()
    for prompt in (SECOND, FIRST):  # the longer one first: nothing may remember its length
        prefill = engine.prefill(prompt, reuse="off")
        ids = oracle.token_ids(subject.rows(prompt))
        assert prefill.report.computed_tokens == prefill.report.prompt_tokens == len(ids)
        assert error(prefill, oracle.stock_logits(subject.twin(), ids)) < TOLERANCE


def test_exact_continues_a_prefix_with_the_logits_of_off(subject: Subject) -> None:
    engine = subject.engine()
    engine.prefill(FIRST, reuse="exact")
    prefill = engine.prefill(LONGER, reuse="exact")
    can_continue = subject.name not in (*NO_CACHE, *TOO_LONG)
    assert (prefill.report.cached_tokens > module_tokens(subject)) == can_continue
    assert (prefill.report.fallback_reason is None) == can_continue
    expected = oracle.stock_logits(subject.twin(), oracle.token_ids(subject.rows(LONGER)))
    assert error(prefill, expected) < TOLERANCE


@pytest.mark.parametrize("name", [*TOO_LONG, *EXACT_ONLY, *NO_CACHE])
def test_what_can_not_be_reused_is_computed_and_the_report_says_why(
    name: str, tiny_lm: Callable[..., CausalLM]
) -> None:
    subject = make_subject(name, 0, tiny_lm)
    engine = subject.engine()
    for prompt in (FIRST, SECOND):
        prefill = engine.prefill(prompt)
        assert prefill.report.fallback_reason
        assert prefill.report.reuse in ("off", "exact")
        assert module_sources(prefill) == {"computed"}
        ids = oracle.token_ids(subject.rows(prompt))
        assert error(prefill, oracle.stock_logits(subject.twin(), ids)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "gptj", "mpt", "bloom"])
def test_documents_encoded_before_any_template_give_the_same_logits(
    name: str, tiny_lm: Callable[..., CausalLM]
) -> None:
    subject = make_subject(name, 0, tiny_lm)
    engine = subject.engine()
    engine.encode([BEES.text, BOAT.text, MILL.text, SHORT.text], progress=False)
    prefill = engine.prefill(SECOND)
    assert module_sources(prefill) == {"memory"}
    assert error(prefill, subject.expected(SECOND)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_without_a_preamble_documents_see_the_first_token_alone(
    name: str, tiny_lm: Callable[..., CausalLM]
) -> None:
    subject = make_subject(name, 0, tiny_lm)
    engine = PromptCacheEngine(subject.lm, reuse="fast", preamble=Preamble.none())
    encoded = "in place" if name in FIXED else "anywhere"
    rows = oracle.lay_out(subject.lm.tokenizer, SECOND, encoded=encoded)
    assert error(engine.prefill(SECOND), oracle.next_logits(subject.twin(), rows)) < TOLERANCE
    assert error(subject.engine().prefill(SECOND), oracle.next_logits(subject.twin(), rows)) > (
        VISIBLE_DIFFERENCE
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", DIVERSE)
def test_greedy_answer_equals_the_masked_forward_of_every_token(
    name: str, seed: int, tiny_lm: Callable[..., CausalLM]
) -> None:
    subject = make_subject(name, seed, tiny_lm)
    engine = subject.engine()
    engine.prefill(FIRST)
    generation = engine.generate(SECOND, SamplingParams(max_tokens=12))
    expected = oracle.greedy(subject.twin(), subject.rows(SECOND), 12, tiny_models.EOS)
    assert list(generation.token_ids) == expected
    assert len(expected) == 12


@pytest.mark.parametrize("seed", [0, 1])
def test_an_answer_that_outgrows_the_original_context_is_the_models_own(
    seed: int, tiny_lm: Callable[..., CausalLM]
) -> None:
    subject = make_subject("phi3/longrope", seed, tiny_lm)
    limit = subject.lm.support.stable_length
    assert limit is not None
    filler = "q" * (limit - 6 - len(oracle.token_ids(subject.rows(FIRST))))  # a token a letter
    prompt = Prompt([*FIRST.segments, Segment(filler)])
    ids = oracle.token_ids(subject.rows(prompt))
    assert len(ids) < limit < len(ids) + 14
    engine = subject.engine()
    own = subject.twin().generate(torch.tensor([ids]), max_new_tokens=14, do_sample=False)
    generation = engine.generate(prompt, SamplingParams(max_tokens=14), reuse="exact")
    assert list(generation.token_ids) == own[0, len(ids) :].tolist()
    again = engine.prefill(prompt, reuse="exact")  # what follows takes over no row of beyond
    assert error(again, oracle.stock_logits(subject.twin(), ids)) < TOLERANCE
