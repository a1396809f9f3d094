"""Repaired states give the logits of one masked forward that holds repaired tokens twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import tiny_models
from pcache_core import CausalLM, Prompt, SamplingParams, Segment
from pcache_core.lm import Batch
from subjects import (
    BEES,
    BOAT,
    CROWDED,
    MILL,
    OPENING,
    REUSING,
    SECOND,
    SEQUENTIAL,
    SHORT,
    TOLERANCE,
    VISIBLE_DIFFERENCE,
    Subject,
    error,
    make_subject,
    module_tokens,
)

WATCHING = [name for name in REUSING if name not in SEQUENTIAL]
# For tests of every architecture that runs through our own attention.
watching_only = pytest.mark.parametrize("subject", WATCHING, indirect=True)
PARTIAL = 0.2
# Plain, soft-capped in windows, windows, sinks, latent attention; fixed positions; ALiBi and rotary
# positions through the model's own attention.
DIVERSE = ["llama", "gemma2", "mistral/sliding", "gpt_oss", "deepseek_v3", "gpt2"]
DIVERSE += ["falcon/alibi", "gptj"]


@pytest.fixture(scope="module", params=REUSING)
def subject(request: pytest.FixtureRequest, tiny_lm: Callable[..., CausalLM]) -> Subject:
    """Every architecture whose documents can be reused."""
    return make_subject(request.param, 0, tiny_lm)


@pytest.fixture(scope="module", params=DIVERSE)
def diverse(request: pytest.FixtureRequest, tiny_lm: Callable[..., CausalLM]) -> Subject:
    """Architectures that differ in how they attend."""
    return make_subject(request.param, 1, tiny_lm)


@pytest.mark.parametrize("budget", [1.0, 0.5, 10**6])
def test_repairing_half_or_more_is_full_prefill(subject: Subject, budget: float) -> None:
    ids = oracle.token_ids(subject.rows(SECOND))
    expected = oracle.stock_logits(subject.twin(), ids)
    engine = subject.engine()
    prefill = engine.prefill(SECOND, "balanced", budget)
    assert not any(part.preamble_tokens for part in prefill.report.segments)
    assert error(prefill, expected) < TOLERANCE
    off = engine.prefill(SECOND, "off")
    assert error(prefill, off.logits) < TOLERANCE


def test_repaired_rows_give_the_logits_of_one_masked_forward(subject: Subject) -> None:
    # A short question, so that windows of 12 tokens reach repaired rows and rows that stayed.
    prompt = Prompt([*SECOND.segments[:-1], Segment("?", "text")])
    prefill = subject.engine().prefill(prompt, "balanced", PARTIAL)
    rows = prefill.report.repaired_rows
    assert 0 < len(rows) == prefill.report.repaired_tokens < module_tokens(subject)
    assert error(prefill, subject.expected(prompt, rows)) < TOLERANCE
    others = {row.place for row in subject.rows(prompt) if row.role == "module"}.difference(rows)
    assert error(prefill, subject.expected(prompt, others)) > VISIBLE_DIFFERENCE
    assert error(prefill, subject.expected(prompt)) > VISIBLE_DIFFERENCE


def test_a_crowded_prompt_without_opening_is_repaired(diverse: Subject) -> None:
    prefill = diverse.engine().prefill(CROWDED, "balanced", PARTIAL)
    rows = prefill.report.repaired_rows
    assert rows
    assert error(prefill, diverse.expected(CROWDED, rows)) < TOLERANCE


@pytest.mark.parametrize("budget", [5, 0.4])
def test_answers_after_repaired_rows_equal_the_masked_forward_of_every_token(
    diverse: Subject, budget: float
) -> None:
    engine = diverse.engine()
    generation = engine.generate(SECOND, SamplingParams(max_tokens=8), "balanced", budget)
    rows = diverse.rows(SECOND, generation.report.repaired_rows)
    expected = oracle.greedy(diverse.twin(), rows, 8, tiny_models.EOS)
    assert list(generation.token_ids) == expected


DOCUMENTS = st.permutations([BEES, BOAT, MILL, SHORT]).flatmap(
    lambda order: st.integers(1, 4).map(lambda count: order[:count])
)
BETWEEN = st.sampled_from([(), (Segment("\n\n"),), (Segment("\nand ", "argument"),)])
BUDGETS = st.one_of(st.integers(2, 40), st.floats(0, 1))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(DOCUMENTS, BETWEEN, st.booleans(), st.sampled_from(["?", "\nWho? A:"]), BUDGETS)
def test_any_budget_on_any_prompt_gives_the_logits_of_one_masked_forward(
    diverse: Subject,
    documents: list[Segment],
    between: tuple[Segment, ...],
    opening: bool,
    question: str,
    budget: float,
) -> None:
    parts = [part for document in documents for part in (document, *between)]
    prompt = Prompt([*([OPENING] if opening else []), *parts, Segment(question)])
    engine = diverse.engine()
    prefill = engine.prefill(prompt, "high", budget)
    rows = prefill.report.repaired_rows
    assert len(rows) == prefill.report.repaired_tokens
    if any(part.preamble_tokens for part in prefill.report.segments):
        expected = diverse.expected(prompt, rows)
    else:  # so much that all was computed
        ids = oracle.token_ids(diverse.rows(prompt))
        expected = oracle.stock_logits(diverse.twin(), ids)
    assert error(prefill, expected) < TOLERANCE


@watching_only
def test_watched_attention_is_the_models_own(subject: Subject) -> None:
    rows = oracle.without_modules(subject.rows(SECOND))
    ids, places = oracle.token_ids(rows), range(len(rows))
    batch = Batch.of_rows(
        subject.lm.new_buffers(len(ids)), ids, places, places, dict.fromkeys(places[-5:], (1.0,))
    )
    subject.lm.forward(batch)
    paid = oracle.attention_paid(subject.twin(), rows, dict.fromkeys(places[-5:], 1.0))
    expected = torch.tensor([paid[place] for place in places])
    # Up to scale: DiffLlama attends twice with the same weights.
    shares = batch.attention[0] / batch.attention.sum()
    torch.testing.assert_close(shares, expected / expected.sum(), rtol=1e-3, atol=1e-6)
    assert shares.max() > 3 * shares.min()


@watching_only
@pytest.mark.parametrize("question", ["\nQ? A:", "?"])  # three tokens, and one behind others
def test_the_question_chooses_what_it_attends_to_most_and_what_follows(
    subject: Subject, question: str
) -> None:
    prompt = Prompt([*SECOND.segments[:-1], Segment(question, "text")])
    engine = subject.engine()
    chosen = engine.prefill(prompt, "balanced", 0.2).report.repaired_rows
    rows = subject.rows(prompt)
    stale = {row.place for row in rows if row.role == "module"}
    last = [row.place for row in rows if row.role == "computed"][-3:]
    paid = oracle.attention_paid(subject.twin(), rows, dict.fromkeys(last, 1.0))
    best: dict[int, None] = {}
    for place in sorted(stale, key=lambda place: -paid[place]):
        best.update(dict.fromkeys(p for p in (place, place + 1) if p in stale))
    assert len(chosen) == len(stale) // 5
    assert set(chosen) == set(list(best)[: len(chosen)])
