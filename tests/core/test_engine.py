"""The engine: modes, reports and streams on a random Llama and on the built-in model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import oracle
import tiny_models
from pcache_core import (
    CausalLM,
    MemoryStore,
    Preamble,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.store import Hit
from subjects import PREAMBLE

OPENING = Segment("Answer from the notes.\n", "literal")
DOCS = {
    "bees": "Ann keeps bees in Oslo.",
    "boat": "Ben sold a red boat to a friend.",
    "mill": "The mill by the lake burned down.",
}


def make_prompt(*names: str, question: str = "\nWho? A:") -> Prompt:
    documents = [Segment(DOCS[name], "document", name) for name in names]
    return Prompt([OPENING, *documents, Segment(question, "argument")])


def sources(report: object) -> dict[str | None, str]:
    return {part.name: part.source for part in report.segments if part.kind == "document"}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


@pytest.fixture
def engine(llama: CausalLM) -> PromptCacheEngine:
    return PromptCacheEngine(llama, reuse="fast")


def test_documents_are_encoded_once_and_served_in_any_order_and_choice(
    engine: PromptCacheEngine,
) -> None:
    first = engine.prefill(make_prompt("bees", "boat", "mill")).report
    assert set(sources(first).values()) == {"encoded"}
    second = engine.prefill(make_prompt("mill", "bees")).report
    assert set(sources(second).values()) == {"memory"}
    assert second.encoded_tokens == 0


def test_the_report_says_what_a_prompt_says_of_itself(engine: PromptCacheEngine) -> None:
    prompt = Prompt(make_prompt("bees").segments, fallback_reason="two documents are hidden")
    assert engine.prefill(prompt).report.fallback_reason == "two documents are hidden"


def test_the_report_counts_every_token_once(engine: PromptCacheEngine) -> None:
    engine.encode([DOCS["bees"]], progress=False)
    report = engine.prefill(make_prompt("mill", "bees")).report
    assert sources(report) == {"mill": "encoded", "bees": "memory"}
    parts = report.cached_tokens + report.encoded_tokens + report.computed_tokens
    assert parts == report.prompt_tokens == 1 + sum(s.num_tokens for s in report.segments)
    opening = 1 + engine.lm.count_tokens(OPENING.text)  # after the first token of all
    assert report.encoded_tokens == opening + engine.lm.count_tokens(DOCS["mill"])
    assert report.ttft_ms >= report.load_ms + report.assemble_ms + report.prefill_ms > 0
    assert engine.reports[-1] is report


def test_the_same_prompt_again_computes_one_token(engine: PromptCacheEngine) -> None:
    engine.prefill(make_prompt("bees", "boat"))
    again = engine.prefill(make_prompt("bees", "boat"))
    assert again.report.computed_tokens == 1
    assert set(sources(again.report).values()) == {"prefix"}


def test_a_prefix_ends_before_a_document_it_holds_in_part(engine: PromptCacheEngine) -> None:
    start = Prompt([OPENING, Segment(DOCS["bees"][:-3], "text"), Segment("?", "text")])
    engine.prefill(start, reuse="exact")
    whole = engine.prefill(make_prompt("bees"))
    fresh = PromptCacheEngine(engine.lm, reuse="fast").prefill(make_prompt("bees"))
    assert sources(whole.report) == {"bees": "encoded"}
    torch.testing.assert_close(whole.logits, fresh.logits, rtol=0, atol=1e-4)


def test_a_sequence_filled_from_states_serves_no_exact_request(engine: PromptCacheEngine) -> None:
    prompt = make_prompt("bees", "boat", "mill")
    off = engine.prefill(prompt, reuse="off").logits
    fast = engine.prefill(prompt, reuse="fast").logits
    exact = engine.prefill(prompt, reuse="exact").logits
    assert (fast - off).abs().max() > 1e-2
    torch.testing.assert_close(exact, off, rtol=0, atol=1e-4)


def test_a_request_without_reuse_leaves_nothing_behind(engine: PromptCacheEngine) -> None:
    prompt = make_prompt("bees", "boat")
    engine.generate(prompt, SamplingParams(max_tokens=4), reuse="off")
    assert engine.store.stats().states == 0
    assert engine.prefill(prompt, reuse="exact").report.cached_tokens == 0


def test_a_conversation_continues_its_own_answer(engine: PromptCacheEngine) -> None:
    for seed in range(20):  # a random answer may not survive decoding and encoding again
        first = make_prompt("bees")
        params = SamplingParams(max_tokens=6, temperature=1.0, seed=seed)
        answer = engine.generate(first, params, reuse="exact")
        if engine.lm.token_ids(answer.text) == list(answer.token_ids):
            break
    else:
        raise AssertionError("no answer survived; choose other seeds")
    history = Prompt([*first.segments, Segment(answer.text), Segment("\nAnd? A:")])
    report = engine.prefill(history, reuse="exact").report
    assert report.cached_tokens >= len(engine.tokenise(first).token_ids) + len(answer.token_ids) - 1


def test_states_do_not_depend_on_what_was_asked_before(llama: CausalLM) -> None:
    prompt = make_prompt("mill", "boat")
    fresh = PromptCacheEngine(llama, reuse="fast").prefill(prompt).logits
    used = PromptCacheEngine(llama, reuse="fast")
    for names in (("boat", "bees"), ("bees", "mill", "boat"), ("boat",)):
        used.generate(make_prompt(*names, question="\nWhy? A:"), SamplingParams(max_tokens=3))
    torch.testing.assert_close(used.prefill(prompt).logits, fresh, rtol=0, atol=1e-4)


def test_states_encoded_together_equal_states_encoded_alone(llama: CausalLM) -> None:
    together = PromptCacheEngine(llama, reuse="fast")
    together.encode(list(DOCS.values()), progress=False)
    alone = PromptCacheEngine(llama, reuse="fast")
    for text in DOCS.values():
        alone.encode([text], progress=False)
    prompt = make_prompt("mill", "bees", "boat")
    expected = alone.prefill(prompt).logits
    torch.testing.assert_close(together.prefill(prompt).logits, expected, rtol=0, atol=1e-4)


def test_encode_reports_what_it_did(engine: PromptCacheEngine) -> None:
    texts = [DOCS["bees"], DOCS["boat"], "no", "", DOCS["bees"]]
    report = engine.encode(texts, progress=False)
    assert (report.texts, report.encoded, report.too_short) == (5, 2, 2)
    assert report.tokens == sum(engine.lm.count_tokens(DOCS[n]) for n in ("bees", "boat"))
    again = engine.encode(texts, progress=False)
    assert (again.encoded, again.already_stored) == (0, 3)


def test_a_state_that_does_not_fit_the_budget_is_used_and_not_kept(llama: CausalLM) -> None:
    budget = 10 * llama.bytes_per_token
    engine = PromptCacheEngine(llama, MemoryStore(budget_bytes=budget), reuse="fast")
    prompt = make_prompt("bees", "mill")
    expected = PromptCacheEngine(llama, reuse="fast").prefill(prompt).logits
    prefill = engine.prefill(prompt)
    torch.testing.assert_close(prefill.logits, expected, rtol=0, atol=1e-4)
    assert set(sources(prefill.report).values()) == {"encoded"}
    assert engine.store.stats().nbytes <= budget


def test_namespaces_share_a_store_but_never_a_state(llama: CausalLM) -> None:
    store = MemoryStore()
    prompt = make_prompt("bees", "mill")
    PromptCacheEngine(llama, store, "fast", "alice").prefill(prompt)
    same = PromptCacheEngine(llama, store, "fast", "alice").prefill(prompt).report
    other = PromptCacheEngine(llama, store, "fast", "bob").prefill(prompt).report
    assert set(sources(same).values()) == {"memory"}
    assert set(sources(other).values()) == {"encoded"}


def test_another_models_states_are_never_served(tiny_lm: Callable[..., CausalLM]) -> None:
    store = MemoryStore()
    prompt = make_prompt("bees", "mill")
    PromptCacheEngine(tiny_lm("llama", seed=1), store, "fast").prefill(prompt)
    report = PromptCacheEngine(tiny_lm("llama", seed=2), store, "fast").prefill(prompt).report
    assert set(sources(report).values()) == {"encoded"}


class Damaging(MemoryStore):
    """Keeps states whose keys lack the last token."""

    def put(self, key: ModuleKey, state: KVState) -> bool:
        return super().put(key, replace(state, keys=tuple(k[:, :, :-1] for k in state.keys)))


def test_a_damaged_state_is_dropped_and_encoded_again(llama: CausalLM) -> None:
    prompt, store = make_prompt("bees", "mill"), Damaging()
    expected = PromptCacheEngine(llama, reuse="fast").prefill(prompt).logits
    PromptCacheEngine(llama, store, "fast").prefill(prompt)
    assert store.stats().states
    prefill = PromptCacheEngine(llama, store, "fast").prefill(prompt)
    assert set(sources(prefill.report).values()) == {"encoded"}
    torch.testing.assert_close(prefill.logits, expected, rtol=0, atol=1e-4)


def test_greedy_generation_equals_transformers_generate(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, reuse="off")
    prompt = make_prompt("bees", "boat")
    ids = torch.tensor([engine.tokenise(prompt).token_ids])
    expected = tiny_models.build("llama").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    got = engine.generate(prompt, SamplingParams(max_tokens=20))
    kept = [t for t in expected[0, ids.shape[1] :].tolist() if t != tiny_models.EOS]
    assert list(got.token_ids) == kept


def test_penalised_generation_equals_transformers_generate(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, reuse="off")
    prompt = make_prompt("mill")
    ids = torch.tensor([engine.tokenise(prompt).token_ids])
    expected = tiny_models.build("llama").generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        repetition_penalty=1.7,
        pad_token_id=0,
    )
    got = engine.generate(prompt, SamplingParams(max_tokens=20, repetition_penalty=1.7))
    kept = [t for t in expected[0, ids.shape[1] :].tolist() if t != tiny_models.EOS]
    assert list(got.token_ids) == kept


@pytest.mark.parametrize("reuse", ["off", "exact", "fast"])
def test_a_seed_makes_sampling_repeatable(engine: PromptCacheEngine, reuse: str) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.95, top_k=40, seed=seed)
        return engine.generate(make_prompt("bees"), params, reuse).token_ids  # type: ignore[arg-type]

    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_top_k_one_and_a_tiny_top_p_are_greedy(engine: PromptCacheEngine) -> None:
    prompt = make_prompt("bees")
    greedy = engine.generate(prompt, SamplingParams(max_tokens=8)).token_ids
    for only_best in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-40}):
        params = SamplingParams(**{"max_tokens": 8, "temperature": 1.0, "seed": 0, **only_best})  # type: ignore[arg-type]
        assert engine.generate(prompt, params).token_ids == greedy


def test_generation_stops_before_a_stop_string_and_at_a_stop_id(engine: PromptCacheEngine) -> None:
    prompt = make_prompt("bees", "mill")
    free = engine.generate(prompt, SamplingParams(max_tokens=30))
    stop = free.text[4:6]
    cut = engine.generate(prompt, SamplingParams(max_tokens=30, stop=[stop]))
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert free.finish_reason == "length"
    ended = engine.generate(
        prompt, SamplingParams(max_tokens=30, stop_token_ids=[free.token_ids[3]])
    )
    assert ended.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3])]


def test_the_stream_is_the_generation_in_pieces(engine: PromptCacheEngine) -> None:
    prompt = make_prompt("bees", "mill")
    params = SamplingParams(max_tokens=20)
    whole = engine.generate(prompt, params)
    chunks = list(engine.stream(prompt, params))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason
    assert chunks[-1].report is engine.reports[-1]
    assert chunks[-1].report.generated_tokens == len(whole.token_ids)


def test_generation_ends_where_the_context_does(tiny_lm: Callable[..., CausalLM]) -> None:
    engine = PromptCacheEngine(tiny_lm("llama"))
    limit = engine.lm.context_length
    assert limit is not None
    prompt = Prompt.from_text("x" * (limit - 4))
    length = len(engine.tokenise(prompt).token_ids)
    params = SamplingParams(max_tokens=100, temperature=1.0, seed=1)
    generation = engine.generate(prompt, params)
    assert len(generation.token_ids) <= limit - length + 1
    assert generation.finish_reason in ("length", "stop")


def test_streams_that_interleave_do_not_disturb_each_other(engine: PromptCacheEngine) -> None:
    prompts = [make_prompt("bees", "mill"), make_prompt("mill", "boat"), make_prompt("boat")]
    params = SamplingParams(max_tokens=15)
    expected = [engine.generate(prompt, params).text for prompt in prompts]
    streams = [engine.stream(prompt, params) for prompt in prompts]
    texts = [""] * len(streams)
    alive = set(range(len(streams)))
    while alive:
        for index in sorted(alive):
            chunk = next(streams[index], None)
            if chunk is None:
                alive.remove(index)
            else:
                texts[index] += chunk.text
    assert texts == expected


def test_an_abandoned_stream_blocks_nobody(engine: PromptCacheEngine) -> None:
    prompt = make_prompt("bees", "mill")
    expected = engine.generate(prompt, SamplingParams(max_tokens=10)).text
    stream = engine.stream(prompt, SamplingParams(max_tokens=50))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    engine.stream(prompt)
    assert engine.generate(prompt, SamplingParams(max_tokens=10)).text == expected


async def test_async_calls_give_the_same_and_leave_the_loop_free(
    engine: PromptCacheEngine,
) -> None:
    prompt = make_prompt("bees", "mill")
    params = SamplingParams(max_tokens=40)
    expected = engine.generate(prompt, params)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticker = asyncio.create_task(tick())
    got = await engine.agenerate(prompt, params)
    pieces = [chunk.text async for chunk in engine.astream(prompt, params)]
    ticker.cancel()
    assert got.token_ids == expected.token_ids
    assert "".join(pieces) == expected.text
    assert ticks > 40


def test_the_users_model_keeps_its_own_attention(llama: CausalLM) -> None:
    before = llama.model.config._attn_implementation
    PromptCacheEngine(llama).prefill(make_prompt("bees"))
    assert llama.model.config._attn_implementation == before
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = tiny_models.build("llama")(ids).logits
    torch.testing.assert_close(llama.model(ids).logits, expected, rtol=0, atol=1e-4)


async def test_a_cancelled_request_ends_quietly_and_blocks_nobody(
    engine: PromptCacheEngine,
) -> None:
    prompt = make_prompt("bees", "mill")
    expected = engine.generate(prompt, SamplingParams(max_tokens=5)).text
    endless = SamplingParams(max_tokens=400, temperature=1.0, seed=2)
    for _ in range(10):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.agenerate(prompt, endless), timeout=0.02)
    assert (await engine.agenerate(prompt, SamplingParams(max_tokens=5))).text == expected


def test_texts_may_come_from_a_generator(engine: PromptCacheEngine) -> None:
    report = engine.encode((text for text in DOCS.values()), False)  # type: ignore[arg-type]
    assert (report.texts, report.encoded, report.kept) == (3, 3, 3)


def test_encoding_more_than_the_budget_says_how_many_were_kept(
    llama: CausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    engine = PromptCacheEngine(llama, MemoryStore(budget_bytes=30 * llama.bytes_per_token))
    report = engine.encode(list(DOCS.values()), progress=False)
    assert report.kept < report.encoded == 3
    assert "raise its budget" in caplog.text


def test_a_store_that_gives_another_documents_state_is_not_believed(llama: CausalLM) -> None:
    class Confused(MemoryStore):
        def put(self, key: ModuleKey, state: KVState) -> bool:
            self.last = state
            return super().put(key, state)

        def get(self, key: ModuleKey) -> Hit | None:
            hit = super().get(key)
            return replace(hit, state=self.last) if hit else None

    store = Confused()
    prompt = make_prompt("bees", "mill")
    expected = PromptCacheEngine(llama, reuse="fast").prefill(prompt).logits
    PromptCacheEngine(llama, store, "fast").prefill(prompt)
    logits = PromptCacheEngine(llama, store, "fast").prefill(prompt).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_openings_that_differ_late_share_their_beginning(engine: PromptCacheEngine) -> None:
    rules = "Be brief. Be kind. Be exact. Be honest. Be quick. " * 2
    for ending in ("A", "B"):
        opening = Segment(rules + ending, "literal")
        prompt = Prompt([opening, Segment(DOCS["bees"], "document"), Segment("?")])
        report = engine.prefill(prompt).report
    assert report.cached_tokens > 0.9 * engine.lm.count_tokens(rules)


def test_requests_without_reuse_evict_no_prefix(engine: PromptCacheEngine) -> None:
    prompt = make_prompt("bees", "mill")
    engine.prefill(prompt, reuse="exact")
    for _ in range(8):
        engine.prefill(make_prompt("boat"), reuse="off")
    assert engine.prefill(prompt, reuse="exact").report.computed_tokens == 1


def test_an_answer_longer_than_its_buffers_continues_in_larger_ones(
    tiny_lm: Callable[..., CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = make_prompt("bees")
    params = SamplingParams(max_tokens=300, temperature=1.0, seed=5)
    expected = PromptCacheEngine(tiny_lm("llama")).generate(prompt, params)
    monkeypatch.setattr("pcache_core.request._USUAL_ANSWER_TOKENS", 1)
    monkeypatch.setattr("pcache_core.prefix_cache._ROUND_UP", 1)
    assert PromptCacheEngine(tiny_lm("llama")).generate(prompt, params).text == expected.text


def test_a_long_document_is_read_in_blocks_with_the_logits_of_one_forward(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    for name in ("llama", "gemma3"):
        lm = tiny_lm(name)
        prompt = Prompt(
            [Segment("So:\n", "literal"), Segment("xy z" * 100, "document"), Segment("?")]
        )
        engine = PromptCacheEngine(lm, reuse="fast", preamble=Preamble(*PREAMBLE))
        rows = oracle.lay_out(lm.tokenizer, prompt, preamble=PREAMBLE)
        assert len(rows) > 300
        expected = oracle.next_logits(tiny_models.build(name), rows)
        torch.testing.assert_close(engine.prefill(prompt).logits, expected, rtol=0, atol=1e-4)


def test_a_stop_string_that_is_a_special_token_ends_the_answer(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, reuse="off")
    prompt = make_prompt("bees")
    for seed in range(200):
        params = SamplingParams(max_tokens=40, temperature=3.0, seed=seed)
        free = engine.generate(prompt, params)
        if 0 in free.token_ids:
            break
    stopped = engine.generate(prompt, replace(params, stop=["<pad>"]))
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(0)]
    assert stopped.finish_reason == "stop"


def test_long_prompts_that_interleave_under_dynamic_scaling_stay_apart(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    engine = PromptCacheEngine(tiny_lm("llama/dynamic-beyond"), reuse="off")
    prompts = [Prompt.from_text("a b c d " * 6), Prompt.from_text("x y z " * 20)]
    params = SamplingParams(max_tokens=8)
    alone = [engine.generate(prompt, params).token_ids for prompt in prompts]
    pairs = zip(*(engine.stream(prompt, params) for prompt in prompts), strict=False)
    chunks = list(pairs)
    for number, expected in enumerate(alone):
        got = [token for pair in chunks for token in pair[number].token_ids]
        assert got == list(expected[: len(got)])
        assert len(got) > 4


def test_exchanging_two_weights_changes_the_fingerprint(tiny_lm: Callable[..., CausalLM]) -> None:
    lm, other = tiny_lm("llama"), tiny_lm("llama")
    assert lm.fingerprint == other.fingerprint
    changed = tiny_models.build("llama")
    weight = changed.model.layers[0].mlp.up_proj.weight
    weight[3, 5], weight[3, 6] = weight[3, 6].clone(), weight[3, 5].clone()
    assert CausalLM(changed, lm.tokenizer).fingerprint != lm.fingerprint
