"""What a repair budget may be, what is repaired, and what the report says of it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcache_core import (
    CausalLM,
    MemoryStore,
    OptionError,
    Preamble,
    Prompt,
    PromptCacheEngine,
    PromptCacheError,
    Segment,
)
from pcache_core.params import REPAIR, ReuseMode, check_repair
from pcache_integrations.langchain import ChatPromptCache
from pcache_integrations.langchain import PromptCacheLLM as LangChainLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM

TOLERANCE = 1e-4
OPENING = Segment("Answer from the notes.\n", "literal")
BEES = Segment("Ann keeps bees in Oslo.", "document", "bees")
BOAT = Segment("Ben sold a red boat to a friend.", "document", "boat")
MILL = Segment("The mill by the lake burned down.", "document", "mill")
QUESTION = Segment("\nWho? A:", "argument")
PROMPT = Prompt([OPENING, BEES, BOAT, Segment("\n\n"), MILL, QUESTION])
BUDGETS = (12, 0.15)
MODES: tuple[ReuseMode, ...] = ("balanced", "high")
MODELS = [LangChainLLM, ChatPromptCache, LlamaIndexLLM]


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


@pytest.fixture
def engine(llama: CausalLM) -> PromptCacheEngine:
    return PromptCacheEngine(llama)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def document_tokens(lm: CausalLM, prompt: Prompt = PROMPT) -> int:
    return sum(lm.count_tokens(part.text) for part in prompt.segments if part.kind == "document")


class TestBudget:
    @pytest.mark.parametrize(
        ("value", "said"),
        [
            (1, r"write repair=1\.0 to compute all .* or repair=2 \(or more\)"),
            (-1, "repair=-1 is out of range; use 0 or more tokens"),
            (2**31 + 1, "out of range"),
            (-0.1, "a share from 0.0 to 1.0"),
            (1.1, "a share from 0.0 to 1.0, or a whole number of tokens"),
            (64.0, "a share from 0.0 to 1.0, or a whole number of tokens"),
            (float("nan"), "out of range"),
            (float("inf"), "out of range"),
            (True, "a number of tokens such as 64, or a share .* 0.15, got bool"),
            ("64", "got str"),
            ((3, 0.1), "got tuple"),
        ],
    )
    def test_what_is_no_budget_is_refused_everywhere(
        self, engine: PromptCacheEngine, value: Any, said: str
    ) -> None:
        with pytest.raises(OptionError, match=said):
            PromptCacheEngine(engine.lm, repair=value)
        for call in (engine.prefill, engine.generate, engine.stream):
            with pytest.raises(OptionError, match=said):
                call(PROMPT, repair=value)
        assert not engine.reports

    @pytest.mark.parametrize("value", [None, 0, 2, 64, 2**31, 0.0, 0.15, 1.0])
    def test_a_budget_stays_the_number_it_is(self, value: float | None) -> None:
        found = check_repair(value)
        assert (found, type(found)) == (value, type(value))

    @pytest.mark.parametrize("mode", ["off", "exact", "fast"])
    def test_a_mode_that_repairs_nothing_takes_no_budget(
        self, engine: PromptCacheEngine, mode: ReuseMode
    ) -> None:
        for call in (engine.prefill, engine.generate, engine.stream):
            with pytest.raises(OptionError, match=f"{mode}.*balanced"):
                call(PROMPT, reuse=mode, repair=12)
        assert not engine.reports
        assert engine.store.stats().states == 0

    @pytest.mark.parametrize("mode", ["off", "exact", "fast", "balanced", "high"])
    def test_a_budget_alone_means_a_mode_that_repairs(
        self, llama: CausalLM, mode: ReuseMode
    ) -> None:
        report = PromptCacheEngine(llama, reuse=mode).prefill(PROMPT, repair=12).report
        assert report.reuse == ("high" if mode == "high" else "balanced")
        assert report.repaired_tokens == 12

    def test_the_engines_budget_takes_the_place_of_the_modes_own(self, llama: CausalLM) -> None:
        for mode, repaired in (("balanced", 7), ("high", 7), ("fast", 0)):
            engine = PromptCacheEngine(llama, repair=7)
            found = engine.prefill(PROMPT, mode)  # type: ignore[arg-type]
            assert found.report.repaired_tokens == repaired

    def test_a_requests_budget_takes_the_place_of_the_engines(self, llama: CausalLM) -> None:
        engine = PromptCacheEngine(llama, repair=7)
        for budget, repaired in ((0, 0), (0.0, 0), (9, 9)):
            assert engine.prefill(PROMPT, repair=budget).report.repaired_tokens == repaired


class TestLanguageModels:
    @pytest.mark.parametrize("make", MODELS)
    @pytest.mark.parametrize("budget", [12, 1.0, 0.15])
    def test_take_a_budget_and_a_preamble_and_keep_them_when_they_are_pickled(
        self, make: Callable[..., Any], budget: float
    ) -> None:
        preamble = Preamble("Read.\n", ["Tea is warm."])
        made = make(repair=budget, preamble=preamble)
        for llm in (made, pickle.loads(pickle.dumps(made))):
            assert (llm.repair, type(llm.repair)) == (budget, type(budget))
            assert llm.preamble == preamble
            assert llm.engine.repair == budget
            assert llm.engine.preamble == preamble

    def test_take_what_came_through_json(self) -> None:
        for budget in (12, 0.15, 1.0):
            data = json.loads(json.dumps(LlamaIndexLLM(repair=budget).to_dict()))
            found = LlamaIndexLLM.from_dict(data).repair
            assert (found, type(found)) == (budget, type(budget))

    def test_of_llama_index_keep_their_preamble_through_json(self) -> None:
        preamble = Preamble("Read.\n", ["Tea is warm."])
        data = json.loads(json.dumps(LlamaIndexLLM(preamble=preamble).to_dict()))
        llm = LlamaIndexLLM.from_dict(data)
        assert llm.preamble == llm.engine.preamble == preamble

    @pytest.mark.parametrize("make", MODELS)
    def test_leave_both_to_the_engine_by_default(self, make: Callable[..., Any]) -> None:
        llm = make()
        assert llm.repair is llm.engine.repair is None
        assert llm.preamble is None
        assert llm.engine.preamble.company is None or llm.engine.preamble == Preamble()

    @pytest.mark.parametrize("make", MODELS)
    @pytest.mark.parametrize("budget", [1, "much", True])
    def test_refuse_what_is_no_budget(self, make: Callable[..., Any], budget: Any) -> None:
        with pytest.raises(PromptCacheError, match="repair"):
            make(repair=budget)

    @pytest.mark.parametrize("make", MODELS)
    def test_refuse_what_is_no_preamble(self, make: Callable[..., Any]) -> None:
        with pytest.raises((PromptCacheError, ValueError), match="preamble"):
            make(preamble=5)

    @pytest.mark.parametrize("make", MODELS)
    def test_take_those_of_a_given_engine(self, make: Callable[..., Any], llama: CausalLM) -> None:
        engine = PromptCacheEngine(llama, repair=12, preamble=Preamble.none())
        assert make(engine=engine).repair == 12
        assert make(engine=engine).preamble == Preamble.none()
        with pytest.raises(OptionError, match="brings its own repair"):
            make(engine=engine, repair=9)
        with pytest.raises(OptionError, match="brings its own preamble"):
            make(engine=engine, preamble=Preamble())

    def test_of_different_budgets_have_different_cached_answers(self) -> None:
        keys = [str(LangChainLLM(repair=budget)._identifying_params) for budget in (3, 9, 0.3)]
        assert len(set(keys)) == 3


class TestShares:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(lengths=st.lists(st.integers(8, 60), min_size=1, max_size=7))
    def test_presets_are_64_tokens_and_a_quarter_or_all_is_computed(
        self, llama: CausalLM, lengths: list[int]
    ) -> None:
        texts = [chr(ord("A") + number) * length for number, length in enumerate(lengths)]
        documents = [Segment(text, "document") for text in texts]
        prompt = Prompt([OPENING, *documents, QUESTION])
        store = MemoryStore()
        PromptCacheEngine(llama, store).encode(texts, progress=False)
        reused = sum(map(llama.count_tokens, texts))
        for mode, budget in (("balanced", 64), ("high", int(0.25 * reused))):
            report = PromptCacheEngine(llama, store).prefill(prompt, mode).report  # type: ignore[arg-type]
            kept = 2 * budget < reused
            assert report.encoded_tokens <= llama.count_tokens(OPENING.text) + 1
            assert report.repaired_tokens == (budget if kept else 0)
            sources = {part.source for part in report.segments if part.kind == "document"}
            assert ("computed" not in sources) == kept

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("budget", "is_all"), [(38, False), (39, True), (0.49, False), (0.5, True), (10**6, True)]
    )
    def test_half_of_the_reused_tokens_or_more_is_one_forward_of_all_but_the_opening(
        self, llama: CausalLM, mode: ReuseMode, budget: float, *, is_all: bool
    ) -> None:
        assert document_tokens(llama) == 78
        engine = PromptCacheEngine(llama)
        prefill = engine.prefill(PROMPT, mode, budget)
        report = prefill.report
        documents = {part.source for part in report.segments if part.kind == "document"}
        assert (documents == {"computed"}) == is_all
        assert (report.repaired_tokens == 0) == is_all
        assert (report.repair_ms == 0) == is_all
        off = engine.prefill(PROMPT, "off").logits
        assert (difference(prefill.logits, off) < TOLERANCE) == is_all
        assert engine.store.stats().states == (1 if is_all else 4)  # the opening's, the documents'

    def test_nothing_to_repair_is_what_fast_gives(self, engine: PromptCacheEngine) -> None:
        fast = engine.prefill(PROMPT, "fast").logits
        for budget in (0, 0.0, 0.001):
            prefill = PromptCacheEngine(engine.lm).prefill(PROMPT, repair=budget)
            assert prefill.report.repaired_tokens == 0
            assert prefill.report.repair_ms == 0
            assert difference(prefill.logits, fast) < TOLERANCE

    @pytest.mark.parametrize("budget", [None, 2, 1.0])
    @pytest.mark.parametrize(
        "prompt",
        [Prompt.from_text(PROMPT.text), Prompt([OPENING, QUESTION]), Prompt([OPENING, BEES])],
        ids=["flat", "no document", "last"],
    )
    def test_what_saw_everything_before_it_is_not_repaired(
        self, engine: PromptCacheEngine, prompt: Prompt, budget: float | None
    ) -> None:
        prefill = engine.prefill(prompt, "high", budget)
        assert prefill.report.repaired_tokens == 0
        assert prefill.report.repair_ms == 0
        assert difference(prefill.logits, engine.prefill(prompt, "off").logits) < TOLERANCE

    def test_a_document_right_after_the_opening_is_repaired_too(
        self, engine: PromptCacheEngine
    ) -> None:
        report = engine.prefill(Prompt([OPENING, BEES, QUESTION]), repair=5).report
        assert [part.repaired_tokens for part in report.segments] == [0, 5, 0]

    def test_an_exact_prefix_is_not_repaired(self, engine: PromptCacheEngine) -> None:
        exact = engine.prefill(PROMPT, "exact")
        prefill = engine.prefill(PROMPT, "high")
        assert prefill.report.repaired_tokens == 0
        assert prefill.report.computed_tokens == 1
        assert difference(prefill.logits, exact.logits) < TOLERANCE

    @pytest.mark.parametrize("budget", BUDGETS)
    def test_what_an_earlier_question_chose_does_not_change_what_the_next_chooses(
        self, llama: CausalLM, budget: float
    ) -> None:
        # The second prompt differs from the first one's in its last token alone.
        for question in ("\nWhy so? A:", "\nWho? A;"):
            other = Prompt([*PROMPT.segments[:-1], Segment(question, "argument")])
            fresh = PromptCacheEngine(llama).prefill(other, repair=budget)
            engine = PromptCacheEngine(llama)
            engine.prefill(PROMPT, repair=budget)
            again = engine.prefill(other, repair=budget)
            assert again.report.repaired_rows == fresh.report.repaired_rows != ()
            assert difference(again.logits, fresh.logits) < TOLERANCE


class TestReport:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("budget", [*BUDGETS, 35])
    def test_repaired_tokens_are_part_of_the_reused_ones(
        self, engine: PromptCacheEngine, mode: ReuseMode, budget: float
    ) -> None:
        report = engine.prefill(PROMPT, mode, budget).report
        rows = report.repaired_rows
        assert 0 < report.repaired_tokens == len(set(rows))
        assert list(rows) == sorted(rows)
        assert report.repaired_tokens <= report.cached_tokens + report.encoded_tokens
        parts = report.cached_tokens + report.encoded_tokens + report.computed_tokens
        assert parts == report.prompt_tokens
        pieces = engine.tokenise(PROMPT).pieces
        for segment, piece in zip(report.segments, pieces, strict=True):
            assert segment.repaired_tokens == sum(piece.start <= row < piece.stop for row in rows)
            most = segment.repaired_tokens > segment.num_tokens / 2
            assert (segment.source == "repaired") == most
            assert segment.kind == "document" or segment.repaired_tokens == 0
        assert report.ttft_ms >= sum(
            (report.load_ms, report.assemble_ms, report.prefill_ms, report.repair_ms)
        )

    def test_what_is_shown_says_how_much_was_repaired(self, engine: PromptCacheEngine) -> None:
        report = engine.prefill(PROMPT, repair=35).report
        said = "computed, 35 repaired"
        assert said in str(report)
        assert said in report._repr_html_()
        for part in report.segments:
            if part.repaired_tokens:
                shown = f"{part.num_tokens} tokens, {part.source}, {part.repaired_tokens} repaired"
                assert f"document {part.name}: {shown}" in report._repr_html_()

    def test_the_presets_are_what_the_documentation_says(self) -> None:
        assert REPAIR == {"balanced": 64, "high": 0.25}
