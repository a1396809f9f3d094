"""Defects of the paper's reference implementation that concern states, each as it must be.

Those of parsing and positions are in test_reference_defects.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

import oracle
import schema_oracle
import tiny_models
from pcache_core import CausalLM, Preamble, PromptCacheEngine, SamplingParams
from pcache_core.kv.sequence import KVSequence
from pcache_core.kv.state import KVState
from pcache_core.store import MemoryStore
from schema_oracle import Encoded, SchemaOracle
from subjects import PREAMBLE

TOLERANCE = 1e-4
VISIBLE_DIFFERENCE = 1e-2
LETTERS = """<schema name="s">
  Answer from these notes.
  <module name="a">Ann keeps bees in Oslo.</module>
  <module name="b">Ben sold a red boat to <param name="who" len="12"/> in May.</module>
  <module name="c">The mill by the lake burned.</module>
</schema>"""
A, B, C = "<a/>", '<b who="Cy"/>', "<c/>"


@pytest.fixture
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


def new_engine(lm: CausalLM, schema: str = LETTERS) -> PromptCacheEngine:
    engine = PromptCacheEngine(lm, reuse="fast", preamble=Preamble(*PREAMBLE))
    engine.add_schema(schema)
    return engine


def pml(*parts: str) -> str:
    return f'<prompt schema="s">{"".join(parts)} Who?</prompt>'


def logits(engine: PromptCacheEngine, prompt: str) -> torch.Tensor:
    return engine.prefill(engine.prompt_from_pml(prompt)).logits


def expected(
    model: str, prompt: str, schema: str = LETTERS, encoded: Encoded = "after the preamble"
) -> torch.Tensor:
    of = SchemaOracle(schema, tiny_models.tiny_tokenizer(), encoded, PREAMBLE)
    positions = "compact" if encoded == "without gaps" else "schema"
    return oracle.next_logits(tiny_models.build(model), of.rows(prompt, positions))


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def stored(engine: PromptCacheEngine, text: str) -> KVState:
    """The state of a module's text after the whole preamble, as the store has it."""
    ids, preamble_ids = tuple(engine.lm.token_ids(text)), engine.preamble_for(text)
    assert isinstance(engine.store, MemoryStore)
    (key,) = (
        key
        for key in engine.store.held_keys()
        if (key.token_ids, key.preamble_ids) == (ids, preamble_ids)
    )
    hit = engine.store.get(key)
    assert hit is not None
    return hit.state


def left_by(engine: PromptCacheEngine) -> KVSequence:
    """What an engine's last request left behind."""
    return engine._prefix_cache._idle[-1]


def test_modules_are_encoded_independently_of_those_before_them(llama: CausalLM) -> None:
    after_one, after_two = new_engine(llama), new_engine(llama)
    logits(after_one, pml(A, C))
    logits(after_two, pml(A, B, C))
    one, other = (stored(e, "The mill by the lake burned.") for e in (after_one, after_two))
    for mine, theirs in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_requests_abc_ac_abc_ab_never_read_another_modules_states(llama: CausalLM) -> None:
    engine = new_engine(llama)
    for uses in ((A, B, C), (A, C), (A, B, C), (A, B)):
        prompt = pml(*uses)
        assert error(logits(engine, prompt), expected("llama", prompt)) < TOLERANCE


@pytest.mark.parametrize("model", ["mpt", "bloom"])
def test_distance_biases_follow_the_order_of_states_whatever_was_used_most(
    model: str, tiny_lm: Callable[..., CausalLM]
) -> None:
    engine = new_engine(tiny_lm(model))
    for uses in ((C,), (C,), (A, C), (C, A), (A, B, C), (C, B)):
        prompt = pml(*uses)
        wanted = expected(model, prompt, encoded="without gaps")
        assert error(logits(engine, prompt), wanted) < TOLERANCE


def test_arguments_keep_their_order_and_see_no_module_behind_them(llama: CausalLM) -> None:
    def argument(uses: Sequence[str]) -> tuple[list[int], torch.Tensor]:
        engine = new_engine(llama)
        prompt = engine.prompt_from_pml(pml(*uses))
        engine.prefill(prompt)
        (piece,) = [p for p in engine.tokenise(prompt).pieces if p.segment.kind == "argument"]
        rows = slice(piece.start, piece.stop)
        return left_by(engine).positions[rows], left_by(engine).buffers.values[0][
            :, :, rows
        ].clone()

    positions, values = argument((A, B))
    with_c, with_c_values = argument((A, B, C))
    assert positions == with_c == sorted(positions)
    assert torch.allclose(values, with_c_values, atol=1e-5)
    _, without_a = argument((B,))
    assert (values - without_a).abs().max() > VISIBLE_DIFFERENCE


def test_a_module_behind_a_gap_is_not_taken_for_what_computing_it_would_give(
    llama: CausalLM,
) -> None:
    schema = "".join(line.strip() for line in LETTERS.splitlines())  # no text between modules
    engine, prompt = new_engine(llama, schema), pml(C)
    plain = SchemaOracle(schema, tiny_models.tiny_tokenizer()).plain(prompt)
    wanted = oracle.next_logits(tiny_models.build("llama"), plain)
    assert error(wanted, expected("llama", prompt, schema)) > VISIBLE_DIFFERENCE
    laid_out = engine.prompt_from_pml(prompt)
    repaired = engine.prefill(laid_out, reuse="balanced", repair=1.0)
    assert error(repaired.logits, wanted) < TOLERANCE
    assert error(engine.prefill(laid_out, reuse="exact").logits, wanted) < TOLERANCE


def test_a_modules_state_is_never_one_that_saw_another_opening(llama: CausalLM) -> None:
    engine, prompt = new_engine(llama), pml(A, C)
    engine.encode(["Ann keeps bees in Oslo.", "The mill by the lake burned."], progress=False)
    assert error(logits(engine, prompt), expected("llama", prompt)) < TOLERANCE


def test_a_short_document_is_not_doubled_by_the_slots_limit(llama: CausalLM) -> None:
    engine = new_engine(
        llama,
        '<schema name="s"><slot name="d" max-tokens="90"/><module name="a">A.</module></schema>',
    )
    text = "Ann keeps bees in Oslo."
    prompt = engine.prompt_from_pml(pml(f"<d><document>{text}</document></d>"))
    assert engine.tokenise(prompt).token_ids == (
        *engine.lm.text.bos_ids,
        *engine.lm.token_ids(text),
        *engine.lm.token_ids(" Who?"),
    )
    assert "".join(part.text for part in engine.prefill(prompt).report.segments) == prompt.text


def test_a_prompt_of_modules_alone_is_run(llama: CausalLM) -> None:
    prompt = '<prompt schema="s"><a/><c/></prompt>'
    assert error(logits(new_engine(llama), prompt), expected("llama", prompt)) < TOLERANCE


@pytest.mark.parametrize("model", ["llama", "gptj", "gpt2"])
def test_positions_far_beyond_the_number_of_tokens_are_the_models_own(
    model: str, tiny_lm: Callable[..., CausalLM]
) -> None:
    schema = LETTERS.replace(
        '<module name="c">', '<slot name="d" max-tokens="380"/>\n<module name="c">'
    )
    encoded: Encoded = "in place" if model == "gpt2" else "after the preamble"
    engine, prompt = new_engine(tiny_lm(model), schema), pml(A, C)
    assert engine.tokenise(engine.prompt_from_pml(prompt)).end > 400
    assert error(logits(engine, prompt), expected(model, prompt, schema, encoded)) < TOLERANCE
    generation = engine.generate(engine.prompt_from_pml(prompt), SamplingParams(max_tokens=5))
    rows = SchemaOracle(schema, tiny_models.tiny_tokenizer(), encoded, PREAMBLE).rows(prompt)
    greedy = schema_oracle.greedy(tiny_models.build(model), rows, len(generation.token_ids))
    assert list(generation.token_ids) == greedy
