"""States: after a constant preamble in their text's language, however they came to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch

import oracle
import tiny_models
from pcache_core import (
    CausalLM,
    MemoryStore,
    OptionError,
    Preamble,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from subjects import PREAMBLE

TEXTS = (
    "Ann keeps bees in Oslo.",
    "Ben sold a red boat to a friend.",
    "The mill by the lake burned down.",
)
OPENINGS = (
    "",
    "Answer from the notes.\n",
    "You are kind, brief and exact. Here is all you know:\n",
)
ENGLISH = "The bees are at home in the garden, and nobody has seen them since."
GERMAN = "Die Bienen sind im Garten, und niemand hat sie seitdem gesehen."
FIRST, LATER = oracle.preamble_ids(tiny_models.tiny_tokenizer(), *PREAMBLE)


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def small() -> CausalLM:
    """A model whose context has room for company in each language."""
    return CausalLM.from_pretrained("builtin:tiny-rag")


def new_engine(lm: CausalLM, preamble: Preamble | None = None) -> PromptCacheEngine:
    return PromptCacheEngine(lm, reuse="fast", preamble=preamble or Preamble(*PREAMBLE))


def ask(texts: Iterable[str], opening: str = OPENINGS[1], question: str = "\nWho? A:") -> Prompt:
    leading = [Segment(opening, "literal")] if opening else []
    documents = [Segment(text, "document") for text in texts]
    return Prompt([*leading, *documents, Segment(question, "argument")])


def stored(engine: PromptCacheEngine, texts: Sequence[str] = TEXTS) -> dict[ModuleKey, KVState]:
    """The states of these documents."""
    store, found = engine.store, {}
    assert isinstance(store, MemoryStore)
    ids = {tuple(engine.lm.token_ids(text)) for text in texts}
    for key in [key for key in store.held_keys() if key.token_ids in ids]:
        hit = store.get(key)
        assert hit is not None
        found[key] = hit.state
    return found


def assert_same(one: dict[ModuleKey, KVState], other: dict[ModuleKey, KVState]) -> None:
    assert one.keys() == other.keys()
    for key, state in one.items():
        assert (state.token_ids, state.position) == (other[key].token_ids, other[key].position)
        tensors = (*state.keys, *state.values), (*other[key].keys, *other[key].values)
        for mine, theirs in zip(*tensors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def assert_part(one: dict[ModuleKey, KVState], whole: dict[ModuleKey, KVState]) -> None:
    assert one
    assert_same(one, {key: whole[key] for key in one})


@pytest.fixture(scope="module")
def ahead(llama: CausalLM) -> dict[ModuleKey, KVState]:
    """What encoding ahead makes."""
    engine = new_engine(llama)
    report = engine.encode(TEXTS, progress=False)
    found = stored(engine)
    assert (report.texts, report.encoded, report.kept, len(found)) == (3, 3, 3, 6)
    assert report.tokens == 2 * sum(map(llama.count_tokens, TEXTS))
    return found


def test_a_text_has_a_state_after_the_opening_alone_and_one_after_its_company(
    llama: CausalLM, ahead: dict[ModuleKey, KVState]
) -> None:
    for text in TEXTS:
        ids = tuple(llama.token_ids(text))
        after = {key.preamble_ids for key in ahead if key.token_ids == ids}
        assert after == {tuple(FIRST), tuple(LATER)}


def test_first_use_makes_the_states_that_encoding_ahead_makes(
    llama: CausalLM, ahead: dict[ModuleKey, KVState]
) -> None:
    engine = new_engine(llama)
    for shift in range(3):
        engine.prefill(ask([*TEXTS[shift:], *TEXTS[:shift]]))
    assert_same(stored(engine), ahead)


def test_what_was_encoded_ahead_is_all_that_a_prompt_wants(llama: CausalLM) -> None:
    engine = new_engine(llama)
    engine.encode(TEXTS, progress=False)
    for order in (TEXTS, TEXTS[::-1], TEXTS[1:]):
        report = engine.prefill(ask(order, opening="")).report
        assert report.encoded_tokens == 0
        sources = {part.source for part in report.segments if part.kind == "document"}
        assert sources == {"memory"}


@pytest.mark.parametrize("opening", OPENINGS, ids=["none", "short", "long"])
@pytest.mark.parametrize("before", ["", "Hello! Hello, how are you? I am fine. Well then: "])
def test_states_are_the_same_whatever_stands_before_them(
    llama: CausalLM, ahead: dict[ModuleKey, KVState], opening: str, before: str
) -> None:
    engine = new_engine(llama)
    prompt = ask(TEXTS, opening)
    if before:
        position = 1 if opening else 0
        parts = list(prompt.segments)
        prompt = Prompt([*parts[:position], Segment(before, "text"), *parts[position:]])
    engine.prefill(prompt)
    found = stored(engine)
    assert_part(found, ahead)
    preambles = {key.token_ids: list(key.preamble_ids) for key in found}
    ids = [tuple(llama.token_ids(text)) for text in TEXTS]
    assert [preambles[each] for each in ids] == [FIRST, LATER, LATER]


def test_states_are_the_same_whatever_was_asked_before(
    llama: CausalLM, ahead: dict[ModuleKey, KVState]
) -> None:
    engine = new_engine(llama)
    for mode in ("exact", "balanced", "off", "high"):
        prompt = ask(TEXTS[::-1], OPENINGS[2], f"\nWhat of {mode}? A:")
        engine.generate(prompt, SamplingParams(max_tokens=3), mode)  # type: ignore[arg-type]
    engine.prefill(Prompt([*ask(TEXTS[:1]).segments, Segment(" Ann.\n"), *ask(TEXTS[1:]).segments]))
    engine.prefill(ask(TEXTS[1:]))
    assert_part(stored(engine), ahead)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_states_that_can_not_move_have_as_much_of_the_preamble_as_fits_before_them(
    tiny_lm: Callable[..., CausalLM], name: str
) -> None:
    engine = new_engine(tiny_lm(name))
    report = engine.prefill(ask(TEXTS, "")).report
    used = [part.preamble_tokens for part in report.segments]
    starts = [piece.start for piece in engine.tokenise(ask(TEXTS, "")).pieces]
    assert used == [*(min(start, len(ids)) for start, ids in zip(
        starts[:3], (FIRST, LATER, LATER), strict=True)), 0]  # fmt: skip


def test_the_report_says_what_each_state_was_encoded_after(llama: CausalLM) -> None:
    engine = new_engine(llama)
    prompt = Prompt([
        Segment(OPENINGS[1], "literal"), Segment(TEXTS[0], "document"), Segment("Yes.", "document"),
        Segment(TEXTS[1], "document"), Segment("\nWho?", "argument"),
    ])  # fmt: skip
    expected = [0, len(FIRST), 0, len(LATER), 0]  # the opening is encoded after nothing
    for _ in ("encoded", "taken over as a prefix"):
        report = engine.prefill(prompt).report
        assert [part.preamble_tokens for part in report.segments] == expected
    for mode, repair in (("off", None), ("balanced", 1.0)):
        fresh = new_engine(llama)
        report = fresh.prefill(prompt, mode, repair).report  # type: ignore[arg-type]
        assert [part.preamble_tokens for part in report.segments] == [0] * 5


def test_a_preamble_without_company_is_one_for_all_places(llama: CausalLM) -> None:
    engine = new_engine(llama, Preamble.none())
    assert engine.preamble_for(ENGLISH) == engine.lm.text.bos_ids
    assert engine.encode(TEXTS, progress=False).tokens == sum(map(llama.count_tokens, TEXTS))
    assert len(stored(engine)) == 3


# The engine's preamble


def test_an_engine_says_its_preamble(llama: CausalLM) -> None:
    engine = new_engine(llama)
    assert engine.preamble == Preamble(*PREAMBLE)
    assert engine.preamble_for(ENGLISH) == engine.preamble_for(GERMAN) == tuple(LATER)
    assert PromptCacheEngine(llama).preamble == Preamble()


@pytest.mark.parametrize("preamble", ["Read:", ["a"], 5, False])
def test_what_is_no_preamble_is_refused(llama: CausalLM, preamble: object) -> None:
    with pytest.raises(OptionError, match=r"must be a Preamble, got .*Preamble\(company=\[...\]\)"):
        PromptCacheEngine(llama, preamble=preamble)  # type: ignore[arg-type]


def test_engines_of_different_preambles_share_a_store_but_no_state(llama: CausalLM) -> None:
    store = MemoryStore()
    for number, preamble in enumerate((Preamble(*PREAMBLE), Preamble("Read!\n", ["Tea is hot."]))):
        engine = PromptCacheEngine(llama, store, "fast", preamble=preamble)
        assert engine.encode(TEXTS, progress=False).already_stored == 0
        assert store.stats().states == 6 * (number + 1)


def test_documents_get_company_in_their_own_language(small: CausalLM) -> None:
    engine = new_engine(small, Preamble())
    prompt = ask([ENGLISH, ENGLISH + " And?", GERMAN])
    engine.prefill(prompt)
    found = stored(engine, [ENGLISH + " And?", GERMAN])
    german = tuple(small.token_ids(GERMAN))
    for key in found:
        own = GERMAN if key.token_ids == german else ENGLISH
        assert key.preamble_ids == engine.preamble_for(own)
        said = small.text.decode(key.preamble_ids)
        assert ("Stadtrat" in said, "council" in said) == (own == GERMAN, own == ENGLISH)
    assert len(found) == 2


def test_the_language_of_one_document_does_not_change_anothers_state(small: CausalLM) -> None:
    alone, beside = (new_engine(small, Preamble()) for _ in range(2))
    alone.prefill(ask([ENGLISH, TEXTS[2]]))
    beside.prefill(ask([GERMAN, TEXTS[2]]))
    assert_same(stored(alone, TEXTS[2:]), stored(beside, TEXTS[2:]))
