"""Prompts of schemas: the engine's logits are those of one masked forward at the same positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import pytest
import torch
from transformers import PreTrainedModel

import oracle
import schema_oracle
import tiny_models
from pcache_core import CausalLM, Preamble, Prompt, PromptCacheEngine, SamplingParams
from pcache_core.pml import Positions
from schema_oracle import Encoded, SchemaOracle
from subjects import PREAMBLE

TOLERANCE = 1e-4
VISIBLE_DIFFERENCE = 1e-2

SCHEMA = """
<schema name="trip">
  You plan trips for people.
  <module name="city">They go to <param name="where" len="9"/> and stay for
    <param name="days" len="5" scaffold="two"/> days, maybe longer.
    <module name="hotel">They sleep in a small hotel by the sea.</module>
    Breakfast is at eight.
  </module>
  Money matters:
  <union>
    <module name="cheap">There is hardly any money to spend.</module>
    <module name="grand">Money is no object at all, so think big and bold.</module>
  </union>
  <slot name="notes" max-tokens="80"/>
  <module name="rain">It will rain all day long.</module>
  <module name="snow" cache="false">It may even snow in the hills.</module>
  <module name="pet">They bring <param name="pet" len="6"/> along, who likes to swim.</module>
  <scaffold modules="rain pet"/>
  Be brief and kind.
</schema>
"""
PROMPTS = {
    "short argument": '<prompt schema="trip"><city where="Oslo" days="3"/><cheap/>Well?</prompt>',
    "nested": '<prompt schema="trip"><city where="Oslo" days="3"><hotel/></city>Well?</prompt>',
    "union": '<prompt schema="trip"><grand/> And then? </prompt>',
    "text between": (
        '<prompt schema="trip">First: <city where="Rome" days="12"/> but listen, <rain/> or '
        "else <snow/> so what now?</prompt>"
    ),
    "documents": (
        '<prompt schema="trip"><cheap/><notes><document name="a">Ann keeps bees in Oslo.'
        '</document> or <document name="b">Ben sold a red boat.</document></notes><rain/>Who?'
        "</prompt>"
    ),
    "scaffold": '<prompt schema="trip"><rain/><snow/><pet pet="a dog"/> Which boots?</prompt>',
    "other order": '<prompt schema="trip"><pet pet="a dog"/><grand/><rain/> Which boots?</prompt>',
}
MODES: tuple[Positions, ...] = ("schema", "compact")


@dataclass
class Subject:
    """A model under test; `twin` is a fresh unmodified copy, which only the oracle runs."""

    name: str
    lm: CausalLM
    oracle: SchemaOracle

    def engine(self) -> PromptCacheEngine:
        engine = PromptCacheEngine(self.lm, reuse="fast", preamble=Preamble(*PREAMBLE))
        engine.add_schema(SCHEMA)
        return engine

    @cached_property
    def twin(self) -> PreTrainedModel:
        return tiny_models.build(self.name)

    def expected(self, pml: str, positions: Positions) -> torch.Tensor:
        return schema_oracle.next_logits(self.twin, self.oracle.rows(pml, positions))

    def plain(self, pml: str, positions: Positions) -> torch.Tensor:
        return schema_oracle.next_logits(self.twin, self.oracle.plain(pml, positions))


def make_subject(
    name: str, tiny_lm: Callable[..., CausalLM], encoded: Encoded = "after the preamble"
) -> Subject:
    lm = tiny_lm(name)
    return Subject(name, lm, SchemaOracle(SCHEMA, tiny_models.tiny_tokenizer(), encoded, PREAMBLE))


TEXT_BETWEEN, DOCUMENTS = PROMPTS["text between"], PROMPTS["documents"]
# gpt_neox rotates a part of each head, falcon runs through its own attention.
MOVABLE = ["mistral/sliding", "gemma3", "deepseek_v3", "gpt_oss", "gpt_neox", "falcon/rotary"]
CASES = [
    *(("llama", name) for name in PROMPTS),
    *((model, name) for model in MOVABLE for name in ("text between", "documents", "scaffold")),
]


@pytest.fixture(scope="module")
def subject_of(tiny_lm: Callable[..., CausalLM]) -> Callable[..., Subject]:
    """A factory: a subject for each name and way of encoding, made once."""
    return cache(lambda name, encoded="after the preamble": make_subject(name, tiny_lm, encoded))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max())


def check(subject: Subject, pml: str, positions: Positions, reason: str | None = None) -> None:
    """The engine's logits are the oracle's, from new states and from those in the store."""
    engine = subject.engine()
    expected = subject.expected(pml, positions)
    prompt = engine.prompt_from_pml(pml, positions=positions)
    assert prompt.text == subject.oracle.resolve(pml, positions).text
    for _ in ("encoded", "from the store"):
        prefill = engine.prefill(prompt)
        assert reason in (prefill.report.fallback_reason or "") if reason else True
        assert error(prefill.logits, expected) < TOLERANCE
        engine = PromptCacheEngine(
            subject.lm, store=engine.store, reuse="fast", preamble=engine.preamble
        )
    assert prefill.report.encoded_tokens == 0
    assert prefill.report.cached_tokens > 8


@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize(("model", "name"), CASES)
def test_states_give_the_logits_of_one_masked_forward(
    model: str, name: str, positions: Positions, subject_of: Callable[..., Subject]
) -> None:
    subject, pml = subject_of(model), PROMPTS[name]
    check(subject, pml, positions)
    if model != "mistral/sliding":  # a window of 12 shows little of the modules to the question
        difference = error(subject.expected(pml, positions), subject.plain(pml, positions))
        assert difference > VISIBLE_DIFFERENCE


@pytest.mark.parametrize("name", ["text between", "nested", "scaffold"])
@pytest.mark.parametrize("model", ["gpt2", "opt"])
def test_states_that_can_not_move_are_encoded_where_the_schema_has_them(
    model: str, name: str, subject_of: Callable[..., Subject]
) -> None:
    check(subject_of(model, "in place"), PROMPTS[name], "schema")


def test_learned_positions_serve_compact_prompts_by_computing_modules(
    subject_of: Callable[..., Subject],
) -> None:
    subject = subject_of("gpt2", "in place")
    engine = subject.engine()
    prefill = engine.prefill(engine.prompt_from_pml(TEXT_BETWEEN, positions="compact"))
    assert "can't be moved" in (prefill.report.fallback_reason or "")
    assert error(prefill.logits, subject.plain(TEXT_BETWEEN, "compact")) < TOLERANCE


@pytest.mark.parametrize("name", ["text between", "scaffold"])
@pytest.mark.parametrize("model", ["bloom", "mpt"])
def test_models_that_count_rows_get_compact_positions_and_say_so(
    model: str, name: str, subject_of: Callable[..., Subject]
) -> None:
    subject, pml = subject_of(model, "without gaps"), PROMPTS[name]
    engine = subject.engine()
    prefill = engine.prefill(engine.prompt_from_pml(pml))
    assert "takes positions from rows" in (prefill.report.fallback_reason or "")
    assert error(prefill.logits, subject.expected(pml, "compact")) < TOLERANCE
    check(subject, pml, "compact")


@pytest.mark.parametrize("model", ["mamba", "llama4"])
def test_models_that_reuse_no_modules_read_the_prompt_compactly(
    model: str, tiny_lm: Callable[..., CausalLM]
) -> None:
    with pytest.warns(UserWarning, match="documents can't be reused"):
        subject = make_subject(model, tiny_lm, "after the preamble")
    engine = subject.engine()
    prefill = engine.prefill(engine.prompt_from_pml(TEXT_BETWEEN))
    assert prefill.report.fallback_reason
    ids = [row.token_id for row in subject.oracle.plain(TEXT_BETWEEN, "compact")]
    assert error(prefill.logits, oracle.stock_logits(subject.twin, ids)) < TOLERANCE


@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize("model", ["llama", "gemma3", "deepseek_v3"])
def test_the_answer_continues_behind_the_largest_position(
    model: str, positions: Positions, subject_of: Callable[..., Subject]
) -> None:
    subject = subject_of(model)
    engine = subject.engine()
    generation = engine.generate(
        engine.prompt_from_pml(TEXT_BETWEEN, positions=positions), SamplingParams(max_tokens=8)
    )
    expected = schema_oracle.greedy(
        subject.twin, subject.oracle.rows(TEXT_BETWEEN, positions), len(generation.token_ids)
    )
    assert list(generation.token_ids) == expected


def test_the_answer_follows_when_the_last_row_is_not_the_last_position(
    subject_of: Callable[..., Subject],
) -> None:
    # Text between modules that is longer than what follows it stands behind that.
    schema = (
        "<schema name='s'><module name='a'>A b c.</module><module name='b'>D.</module></schema>"
    )
    pml = f"<prompt schema='s'><a/>{'long text ' * 4}<b/></prompt>"
    subject = subject_of("llama")
    other = SchemaOracle(schema, subject.oracle.tokenizer)
    rows = other.plain(pml)
    assert rows[-1].position < max(row.position for row in rows)
    engine = subject.engine()
    engine.add_schema(schema)
    generation = engine.generate(engine.prompt_from_pml(pml), SamplingParams(max_tokens=6))
    assert list(generation.token_ids) == schema_oracle.greedy(subject.twin, rows, 6)


@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize("name", ["text between", "documents", "nested"])
def test_off_and_exact_compute_the_same_ids_and_positions(
    name: str, positions: Positions, subject_of: Callable[..., Subject]
) -> None:
    subject, pml = subject_of("llama"), PROMPTS[name]
    engine = subject.engine()
    prompt = engine.prompt_from_pml(pml, positions=positions)
    rows = subject.oracle.plain(pml, positions)
    tokens = engine.tokenise(prompt)
    assert list(tokens.token_ids) == [row.token_id for row in rows]
    assert list(tokens.positions) == [row.position for row in rows]
    for reuse in ("off", "exact", "exact"):
        prefill = engine.prefill(prompt, reuse=reuse)
        assert error(prefill.logits, subject.plain(pml, positions)) < TOLERANCE
    assert prefill.report.cached_tokens == len(rows) - 1


@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize("model", ["llama", "gemma3", "gptj", "deepseek_v3"])
def test_repairing_everything_is_a_full_prefill(
    model: str, positions: Positions, subject_of: Callable[..., Subject]
) -> None:
    subject = subject_of(model)
    for pml in (TEXT_BETWEEN, DOCUMENTS):
        engine = subject.engine()
        prompt = engine.prompt_from_pml(pml, positions=positions)
        prefill = engine.prefill(prompt, reuse="balanced", repair=1.0)
        assert not any(part.preamble_tokens for part in prefill.report.segments)
        assert error(prefill.logits, subject.plain(pml, positions)) < TOLERANCE


def test_a_sequence_with_the_same_tokens_in_other_positions_is_not_continued(
    subject_of: Callable[..., Subject],
) -> None:
    subject = subject_of("llama")
    engine = subject.engine()
    for positions in ("schema", "compact", "schema"):
        prompt = engine.prompt_from_pml(TEXT_BETWEEN, positions=positions)
        prefill = engine.prefill(prompt)
        assert error(prefill.logits, subject.expected(TEXT_BETWEEN, positions)) < TOLERANCE
    flat = engine.prefill(Prompt(prompt.segments), reuse="exact")
    expected = oracle.stock_logits(subject.twin, list(engine.tokenise(prompt).token_ids))
    assert error(flat.logits, expected) < TOLERANCE
    again = engine.prefill(prompt, reuse="exact")
    assert error(again.logits, subject.plain(TEXT_BETWEEN, "schema")) < TOLERANCE


def test_a_prefix_never_ends_within_a_unit(subject_of: Callable[..., Subject]) -> None:
    subject = subject_of("llama")
    engine = subject.engine()
    for pml in (*PROMPTS.values(), *reversed(PROMPTS.values())):
        prefill = engine.prefill(engine.prompt_from_pml(pml))
        assert error(prefill.logits, subject.expected(pml, "schema")) < TOLERANCE


def test_a_stand_in_is_seen_while_encoding_and_then_dropped(
    subject_of: Callable[..., Subject],
) -> None:
    subject = subject_of("llama")
    pml = PROMPTS["short argument"]
    bare = replace(subject.oracle, schema=SCHEMA.replace(' scaffold="two"', ""))
    without = schema_oracle.next_logits(subject.twin, bare.rows(pml))
    assert error(subject.expected(pml, "schema"), without) > VISIBLE_DIFFERENCE / 10
    rows = subject.oracle.rows(pml)
    assert oracle.token_ids(rows) == oracle.token_ids(bare.rows(pml))


def test_states_of_a_scaffold_are_other_states(subject_of: Callable[..., Subject]) -> None:
    subject = subject_of("llama")
    alone = replace(subject.oracle, schema=SCHEMA.replace('<scaffold modules="rain pet"/>', ""))
    pml = PROMPTS["scaffold"]
    separate = schema_oracle.next_logits(subject.twin, alone.rows(pml))
    assert error(subject.expected(pml, "schema"), separate) > VISIBLE_DIFFERENCE
