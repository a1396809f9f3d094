"""What a repair policy may ask for, what is repaired, and what the report says of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcache_core import CausalLM, OptionError, Prompt, PromptCacheEngine, PromptCacheError, Segment
from pcache_core.params import REPAIR, RepairPolicy, ReuseMode
from pcache_integrations.langchain import ChatPromptCache
from pcache_integrations.langchain import PromptCacheLLM as LangChainLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM
from subjects import repaired_rows

TOLERANCE = 1e-4
OPENING = Segment("Answer from the notes.\n", "literal")
BEES = Segment("Ann keeps bees in Oslo.", "document", "bees")
BOAT = Segment("Ben sold a red boat to a friend.", "document", "boat")
MILL = Segment("The mill by the lake burned down.", "document", "mill")
QUESTION = Segment("\nWho? A:", "argument")
PROMPT = Prompt([OPENING, BEES, BOAT, Segment("\n\n"), MILL, QUESTION])
EVERYTHING = RepairPolicy(head_tokens=0, query_ratio=1.0)
A_FEW = RepairPolicy(head_tokens=3, query_ratio=0.1)
MODELS = [LangChainLLM, ChatPromptCache, LlamaIndexLLM]


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


@pytest.fixture
def engine(llama: CausalLM) -> PromptCacheEngine:
    return PromptCacheEngine(llama)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def stale_runs(engine: PromptCacheEngine, prompt: Prompt) -> list[range]:
    """Rows of each document but one that stands directly behind the opening."""
    tokens = engine.tokenise(prompt)
    return [
        range(piece.start, piece.stop)
        for piece in tokens.pieces
        if piece.segment.kind == "document" and piece.start > tokens.opening
    ]


class TestPolicy:
    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("head_tokens", -1, "0 or more"),
            ("head_tokens", 1.5, "an integer"),
            ("head_tokens", True, "an integer"),
            ("head_tokens", "16", "an integer"),
            ("head_tokens", None, "an integer"),
            *(
                (name, value, "from 0 to 1")
                for name in ("query_ratio", "max_ratio")
                for value in (-0.1, 1.1, 10, float("nan"), float("inf"), True, "0.1", None)
            ),
        ],
    )
    def test_a_value_out_of_range_is_an_error_that_names_it(
        self, name: str, value: object, allowed: str
    ) -> None:
        values: dict[str, Any] = {"head_tokens": 4, "query_ratio": 0.1, name: value}
        with pytest.raises(OptionError, match=f"{name}.*{allowed}") as caught:
            RepairPolicy(**values)
        assert repr(value) in str(caught.value)

    @pytest.mark.parametrize("policy", [0.1, "high", {"head_tokens": 4, "query_ratio": 0.1}])
    def test_what_is_no_policy_is_refused(self, engine: PromptCacheEngine, policy: object) -> None:
        with pytest.raises(OptionError, match="must be a RepairPolicy, got"):
            PromptCacheEngine(engine.lm, repair=policy)  # type: ignore[arg-type]
        for call in (engine.prefill, engine.generate, engine.stream):
            with pytest.raises(OptionError, match="must be a RepairPolicy, got"):
                call(PROMPT, repair=policy)  # type: ignore[arg-type]

    @pytest.mark.parametrize("mode", ["off", "exact", "fast"])
    def test_a_mode_that_repairs_nothing_takes_no_policy(
        self, engine: PromptCacheEngine, mode: ReuseMode
    ) -> None:
        for call in (engine.prefill, engine.generate, engine.stream):
            with pytest.raises(OptionError, match=f"{mode}.*balanced"):
                call(PROMPT, reuse=mode, repair=A_FEW)
        assert not engine.reports
        assert engine.store.stats().states == 0

    @pytest.mark.parametrize("mode", ["off", "exact", "fast", "balanced", "high"])
    def test_a_policy_alone_means_a_mode_that_repairs(
        self, llama: CausalLM, mode: ReuseMode
    ) -> None:
        report = PromptCacheEngine(llama, reuse=mode).prefill(PROMPT, repair=EVERYTHING).report
        assert report.reuse == ("high" if mode == "high" else "balanced")
        assert report.repaired_tokens > 0

    def test_the_engines_policy_takes_the_place_of_the_modes_own(self, llama: CausalLM) -> None:
        engine = PromptCacheEngine(llama, repair=EVERYTHING)
        off = engine.prefill(PROMPT, "off").logits
        for mode in REPAIR:
            assert difference(engine.prefill(PROMPT, mode).logits, off) < TOLERANCE
        assert engine.prefill(PROMPT, "fast").report.repaired_tokens == 0

    def test_a_requests_policy_takes_the_place_of_the_engines(self, llama: CausalLM) -> None:
        nothing = RepairPolicy(head_tokens=0, query_ratio=0)
        engine = PromptCacheEngine(llama, repair=EVERYTHING)
        assert engine.prefill(PROMPT, repair=nothing).report.repaired_tokens == 0

    @pytest.mark.parametrize("make", MODELS)
    def test_language_models_take_a_policy(self, make: Callable[..., Any]) -> None:
        assert make(repair=A_FEW).engine.repair == A_FEW
        assert pickle.loads(pickle.dumps(make(repair=A_FEW))).repair == A_FEW
        assert make().engine.repair is None

    @pytest.mark.parametrize("make", MODELS)
    def test_language_models_refuse_what_is_no_policy(self, make: Callable[..., Any]) -> None:
        with pytest.raises(PromptCacheError, match="RepairPolicy"):
            make(repair=0.1)

    @pytest.mark.parametrize("make", MODELS)
    def test_an_engine_brings_its_own_policy(
        self, make: Callable[..., Any], llama: CausalLM
    ) -> None:
        engine = PromptCacheEngine(llama, repair=A_FEW)
        assert make(engine=engine).repair == A_FEW
        with pytest.raises(OptionError, match="brings its own repair"):
            make(engine=engine, repair=EVERYTHING)


class TestShares:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(lengths=st.lists(st.integers(8, 60), min_size=1, max_size=8))
    def test_presets_keep_their_share_of_the_reused_tokens(
        self, llama: CausalLM, lengths: list[int]
    ) -> None:
        texts = [chr(ord("A") + number) * length for number, length in enumerate(lengths)]
        documents = [Segment(text, "document") for text in texts]
        prompt = Prompt([OPENING, *documents, QUESTION])
        engine = PromptCacheEngine(llama)
        engine.encode(texts, progress=False)
        shares = {}
        for mode, policy in REPAIR.items():
            report = engine.prefill(prompt, mode).report
            assert report.encoded_tokens == 0
            assert report.repaired_tokens <= policy.max_ratio * report.cached_tokens
            shares[mode] = report.repaired_tokens
        assert shares["balanced"] <= 0.15 * report.cached_tokens
        assert shares["balanced"] <= shares["high"]

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(
        lengths=st.lists(st.integers(8, 60), min_size=2, max_size=8),
        head_tokens=st.integers(0, 40),
        max_ratio=st.floats(0, 1),
    )
    def test_the_limit_shortens_all_heads_alike(
        self, llama: CausalLM, lengths: list[int], head_tokens: int, max_ratio: float
    ) -> None:
        documents = [Segment("abcdefgh"[n % 8] * length, "document") for n, length in
                     enumerate(lengths)]  # fmt: skip
        prompt = Prompt([OPENING, *documents, QUESTION])
        engine = PromptCacheEngine(llama)
        engine.prefill(prompt, repair=RepairPolicy(head_tokens, 0, max_ratio))
        rows = set(repaired_rows(engine))
        runs = stale_runs(engine, prompt)
        heads = [len(rows.intersection(run)) for run in runs]
        longest = max(heads)
        assert heads == [min(longest, len(run)) for run in runs]
        assert all(set(run[:head]) <= rows for run, head in zip(runs, heads, strict=True))
        assert longest <= head_tokens
        if max_ratio == 1 and head_tokens <= min(lengths):
            assert longest == head_tokens

    def test_nothing_to_repair_is_what_fast_gives(self, engine: PromptCacheEngine) -> None:
        fast = engine.prefill(PROMPT, "fast").logits
        for policy in (RepairPolicy(0, 0), RepairPolicy(9, 0.5, max_ratio=0)):
            prefill = PromptCacheEngine(engine.lm).prefill(PROMPT, repair=policy)
            assert prefill.report.repaired_tokens == 0
            assert prefill.report.repair_ms == 0
            assert difference(prefill.logits, fast) < TOLERANCE

    @pytest.mark.parametrize("policy", [None, EVERYTHING])
    @pytest.mark.parametrize(
        "prompt",
        [
            Prompt([OPENING, BEES, QUESTION]),
            Prompt([BEES, QUESTION]),
            Prompt([OPENING, BEES, Segment("\n"), Segment("short", "document"), QUESTION]),
            Prompt.from_text(PROMPT.text),
            Prompt([OPENING, QUESTION]),
            Prompt([OPENING, BEES]),
        ],
        ids=["behind its opening", "behind bos", "short", "flat", "no document", "last"],
    )
    def test_what_saw_everything_before_it_is_not_repaired(
        self, engine: PromptCacheEngine, prompt: Prompt, policy: RepairPolicy | None
    ) -> None:
        prefill = engine.prefill(prompt, "high", policy)
        assert prefill.report.repaired_tokens == 0
        assert prefill.report.repair_ms == 0
        assert difference(prefill.logits, engine.prefill(prompt, "off").logits) < TOLERANCE

    def test_an_exact_prefix_is_not_repaired(self, engine: PromptCacheEngine) -> None:
        exact = engine.prefill(PROMPT, "exact")
        prefill = engine.prefill(PROMPT, "high")
        assert prefill.report.repaired_tokens == 0
        assert prefill.report.computed_tokens == 1
        assert difference(prefill.logits, exact.logits) < TOLERANCE

    def test_a_state_behind_bos_alone_is_stale_behind_a_longer_opening(
        self, engine: PromptCacheEngine
    ) -> None:
        engine.encode([BEES.text], progress=False)
        prompt = Prompt([OPENING, BEES, QUESTION])
        off = PromptCacheEngine(engine.lm).prefill(prompt, "off").logits
        assert difference(engine.prefill(prompt, "fast").logits, off) > 1e-2
        repaired = PromptCacheEngine(engine.lm, engine.store).prefill(prompt, repair=EVERYTHING)
        assert repaired.report.repaired_tokens == engine.lm.count_tokens(BEES.text)
        assert difference(repaired.logits, off) < TOLERANCE


class TestReport:
    @pytest.mark.parametrize("mode", ["balanced", "high"])
    @pytest.mark.parametrize("policy", [None, A_FEW, RepairPolicy(6, 0.2)])
    def test_repaired_tokens_are_part_of_the_reused_ones(
        self, engine: PromptCacheEngine, mode: ReuseMode, policy: RepairPolicy | None
    ) -> None:
        report = engine.prefill(PROMPT, mode, policy).report
        rows = repaired_rows(engine)
        assert 0 < report.repaired_tokens == len(rows)
        assert report.repaired_tokens <= report.cached_tokens + report.encoded_tokens
        parts = report.cached_tokens + report.encoded_tokens + report.computed_tokens
        assert parts == report.prompt_tokens
        pieces = engine.tokenise(PROMPT).pieces
        for segment, piece in zip(report.segments, pieces, strict=True):
            assert segment.repaired_tokens == sum(piece.start <= row < piece.stop for row in rows)
            most = segment.repaired_tokens > segment.num_tokens / 2
            assert (segment.source == "repaired") == most
        assert report.ttft_ms >= sum(
            (report.load_ms, report.assemble_ms, report.prefill_ms, report.repair_ms)
        )

    def test_what_is_shown_says_how_much_was_repaired(self, engine: PromptCacheEngine) -> None:
        report = engine.prefill(PROMPT, repair=EVERYTHING).report
        sources = {segment.name: segment.source for segment in report.segments}
        assert (sources["bees"], sources["boat"], sources["mill"]) == (
            "encoded",
            "repaired",
            "repaired",
        )
        said = f"computed, {report.repaired_tokens} repaired"
        assert said in str(report)
        assert said in report._repr_html_()
        boat = engine.lm.count_tokens(BOAT.text)
        assert f"document boat: {boat} tokens, repaired, {boat} repaired" in report._repr_html_()
