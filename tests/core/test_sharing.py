"""Documents that running requests have in common: held once, and the logits that copies give.

A stream that was begun and is not read on holds its documents in use. The oracle is one cache-less
forward of an unmodified model under an explicit mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

import oracle
import tiny_models
from pcache_core import (
    CausalLM,
    DiskStore,
    MemoryStore,
    ModuleStore,
    Preamble,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)
from pcache_core.lm import Batch, Span
from pcache_core.lm.attention import IMPLEMENTATION, slot_attention
from pcache_core.lm.kernels import Scratch, attend, attend_by_matmul, attend_with_lse, merge
from pcache_core.params import ReuseMode
from subjects import PREAMBLE

TOLERANCE = 1e-4
OPENING = Segment("Answer from the notes.\n", "literal")
DOCS = [
    Segment(text, "document")
    for text in (
        "Ann keeps nine bees in the north of Oslo.",
        "Ben sold a red boat to a friend of his.",
        "The mill by the lake burned down in May.",
        "Cy wrote a long card to Ann and to Ben.",
    )
]
LENDING = ["llama", "qwen3", "glm", "gpt_neox", "smollm3", "mixtral", "phi3", "cohere"]
COPYING = ["gemma2", "gemma3", "gpt_oss", "deepseek_v3", "gpt2", "mpt"]


def ask(order: Sequence[int], question: str = "\nWho is it? A:") -> Prompt:
    """Documents in this order, plain text between the first and the second of them."""
    documents = [DOCS[number] for number in order]
    between = Segment(" Also: ", "text")
    return Prompt([OPENING, documents[0], between, *documents[1:], Segment(question, "argument")])


def expected(name: str, prompt: Prompt, repaired: Sequence[int] = ()) -> torch.Tensor:
    model, tokenizer = tiny_models.build(name, seed=3), tiny_models.tiny_tokenizer()
    rows = oracle.lay_out(tokenizer, prompt, preamble=PREAMBLE, repaired=repaired)
    return oracle.next_logits(model, rows)


def new_engine(
    lm: CausalLM, store: ModuleStore | None = None, reuse: ReuseMode = "fast"
) -> PromptCacheEngine:
    return PromptCacheEngine(lm, store, reuse, preamble=Preamble(*PREAMBLE))


@contextmanager
def begun(engine: PromptCacheEngine, *prompts: Prompt) -> Iterator[None]:
    """Inside, these requests are running: one token of each is there."""
    with ExitStack() as stack:
        for prompt in prompts:
            stream = engine.stream(prompt, SamplingParams(max_tokens=8, temperature=1, seed=0))
            stack.enter_context(closing(stream))
            next(stream)
        yield


@pytest.mark.parametrize("name", LENDING)
def test_a_document_in_use_by_another_request_gives_the_logits_of_one_masked_forward(
    tiny_lm: Callable[..., CausalLM], name: str
) -> None:
    lm = tiny_lm(name, seed=3)
    engine = new_engine(lm)
    documents = sum(lm.count_tokens(document.text) for document in DOCS)
    with begun(engine, ask([0, 1, 2, 3])):
        for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
            found = engine.prefill(ask(order))
            assert found.report.shared_tokens == documents
            assert (found.logits - expected(name, ask(order))).abs().max() < TOLERANCE
    alone = engine.prefill(ask([1, 3, 0, 2]))
    assert alone.report.shared_tokens == 0


@pytest.mark.parametrize("budget", [2, 25, 0.15, 0.49])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_tokens_on_loan_that_are_computed_again_give_the_logits_of_one_masked_forward(
    tiny_lm: Callable[..., CausalLM], name: str, budget: float
) -> None:
    lm = tiny_lm(name, seed=3)
    engine = new_engine(lm)
    with begun(engine, ask([0, 1, 2, 3])):
        for order in ([2, 0, 3, 1], [3, 2, 1, 0], [0, 1, 3, 2]):
            prompt = ask(order)
            found = engine.prefill(prompt, repair=budget)
            repaired = found.report.repaired_rows
            right = expected(name, prompt, repaired=repaired)
            assert (found.logits - right).abs().max() < TOLERANCE
            alone = new_engine(lm, engine.store).prefill(prompt, repair=budget)
            assert found.report.shared_tokens > 0 == alone.report.shared_tokens
            assert 0 < len(repaired) == found.report.repaired_tokens
            assert repaired == alone.report.repaired_rows
            assert (found.logits - alone.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [1, 3, 2, 0]])
def test_what_a_question_looks_at_is_the_same_on_loan_and_in_copies(
    tiny_lm: Callable[..., CausalLM], order: list[int]
) -> None:
    lm = tiny_lm("llama", seed=3)
    engine = new_engine(lm)
    engine.encode([document.text for document in DOCS], progress=False)
    copied = new_engine(lm, engine.store).prefill(ask(order), "balanced", 20).report
    with begun(engine, ask([0, 1, 2, 3])):
        lent = engine.prefill(ask(order), "balanced", 20).report
    assert lent.shared_tokens > 0 == copied.shared_tokens
    assert [document.name for document in lent.documents] == [d.name for d in copied.documents]
    shares = [document.share for document in copied.documents]
    assert [document.share for document in lent.documents] == pytest.approx(shares, rel=1e-4)
    assert lent.repaired_rows == copied.repaired_rows
    assert max(shares) > 1.2 * min(shares) > 0


@pytest.mark.parametrize("name", COPYING)
def test_models_that_cannot_lend_copy_and_are_right(
    tiny_lm: Callable[..., CausalLM], name: str
) -> None:
    engine = new_engine(tiny_lm(name, seed=3))
    with begun(engine, ask([0, 1, 2, 3])):
        found = engine.prefill(ask([0, 1, 3, 2]))
    assert found.report.shared_tokens == 0
    alone = new_engine(tiny_lm(name, seed=3)).prefill(ask([0, 1, 3, 2]))
    assert (found.logits - alone.logits).abs().max() < TOLERANCE


def test_an_answer_that_outgrows_its_slot_keeps_what_is_on_loan(
    tiny_lm: Callable[..., CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama", seed=3)
    engine = new_engine(lm)
    long = SamplingParams(max_tokens=200, stop_token_ids=[])
    prompt = ask([2, 0, 3, 1])
    alone = new_engine(lm, engine.store).generate(prompt, long)
    with begun(engine, ask([0, 1, 2, 3])):
        monkeypatch.setattr("pcache_core.request._USUAL_ANSWER_TOKENS", 1)
        monkeypatch.setattr("pcache_core.prefix_cache._ROUND_UP", 1)
        stream = engine.stream(prompt, long)
        answer = [token for chunk in stream for token in chunk.token_ids]
    assert tuple(answer) == alone.token_ids


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_conversation_goes_on_over_documents_on_loan(
    tiny_lm: Callable[..., CausalLM], mode: str
) -> None:
    engine = new_engine(tiny_lm("llama", seed=3))
    first, second = ask([2, 0, 3, 1]), ask([2, 0, 3, 1], "\nWho is it? A: no. Who then? A:")
    with begun(engine, ask([0, 1, 2, 3])):
        assert engine.prefill(first).report.shared_tokens
    found = engine.prefill(second, reuse=mode)  # type: ignore[arg-type]
    if mode == "exact":
        # Nothing but rows with full sight may serve it: those of the opening.
        plain = oracle.stock_logits(
            tiny_models.build("llama", seed=3), list(engine.tokenise(second).token_ids)
        )
        assert (found.logits - plain).abs().max() < TOLERANCE
        return
    assert [segment.source for segment in found.report.segments][:-1] == ["prefix"] * 6
    assert (found.logits - expected("llama", second)).abs().max() < TOLERANCE


def test_what_a_store_drops_meanwhile_still_serves_those_who_have_it_on_loan(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    lm = tiny_lm("llama", seed=3)
    engine = new_engine(lm)
    answer = SamplingParams(max_tokens=12)
    prompt = ask([2, 0, 3, 1])
    alone = new_engine(lm).generate(prompt, answer).token_ids
    with begun(engine, ask([0, 1, 2, 3])):
        stream = engine.stream(prompt, answer)
        tokens = list(next(stream).token_ids)
        engine.forget([document.text for document in DOCS])
        tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tuple(tokens) == alone


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_sixteen_running_requests_hold_less_than_a_third_of_sixteen_copies(
    tiny_lm: Callable[..., CausalLM], kind: str, tmp_path: Path
) -> None:
    lm = tiny_lm("llama", seed=3)
    store = MemoryStore() if kind == "memory" else DiskStore(tmp_path)
    engine = new_engine(lm, store)
    long = [
        Segment(f"{number}: {document.text * 3}", "document")
        for number, document in enumerate(DOCS)
    ]
    question = Segment("\nWho? A:", "argument")
    prompts = [
        Prompt([OPENING, long[0], *(long[1 + (number + more) % 3] for more in range(2)), question])
        for number in range(16)
    ]
    with begun(engine, prompts[0]):
        alone = engine.kv_bytes()
    with begun(engine, *prompts):
        assert engine.kv_bytes() < 16 * alone / 3


def test_a_failed_reading_leaves_no_document_in_use(tiny_lm: Callable[..., CausalLM]) -> None:
    lm = tiny_lm("llama", seed=3)
    engine = new_engine(lm)
    failing = lm.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with failing, pytest.raises(ZeroDivisionError):
        engine.prefill(ask([0, 1, 2, 3]))
    assert engine.prefill(ask([0, 1, 2, 3])).report.shared_tokens == 0
    assert engine.kv_bytes() == 0


def softmax_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """In fp64, heads repeated: [1, heads, tokens, dim]."""
    group = query.shape[1] // key.shape[1]
    key, value = (rows.double().repeat_interleave(group, 1) for rows in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scale
    scores = scores + bias.double()[: query.shape[2]]
    return torch.softmax(scores, -1) @ value


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).pow(2).mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 40), (24, 300), (40, 1100)])
# 20: what all keys have in common is larger than they are, as where they have a bias.
@pytest.mark.parametrize("common", [0, 20])
def test_kernels_are_as_exact_as_the_flash_kernel(
    dtype: torch.dtype, tokens: int, rows: int, common: int
) -> None:
    torch.manual_seed(0)
    query = (3 * torch.randn(1, 6, tokens, 24)).to(dtype)
    key = (torch.randn(1, 2, rows, 24) + common * torch.randn(24)).to(dtype)
    value = torch.randn(1, 2, rows, 24).to(dtype)
    hidden = torch.ones(tokens, rows).triu(rows - tokens + 1).bool()
    bias = torch.zeros(tokens, rows, dtype=dtype)
    bias = bias.masked_fill(hidden, torch.finfo(dtype).min).repeat(3, 1)
    right = softmax_attention(query, key, value, bias, 0.31)
    flash = attend(query, key, value, bias, 0.31)
    cut = rows // 3
    parts = [
        attend_with_lse(query, key[:, :, a:b], value[:, :, a:b], bias[:, a:b], 0.31)
        for a, b in ((0, cut), (cut, rows))
    ]
    outputs, lses = (torch.stack([part[which][0] for part in parts]) for which in (0, 1))
    assert error(merge(outputs, lses)[None], right) < 1.5 * error(flash, right)
    found = attend_by_matmul(query, key, value, bias, 0.31, Scratch())
    assert error(found, right) < 1.5 * error(flash, right)


@pytest.mark.usefixtures("real_lm")  # or why there is none
def test_in_bfloat16_products_are_as_near_to_a_real_models_attention_as_the_flash_kernel() -> None:
    lm = CausalLM.from_pretrained("builtin:smollm2", dtype="float32")
    found: list[tuple[torch.Tensor, ...]] = []

    def spy(module: torch.nn.Module, *states: torch.Tensor, **options: Any) -> Any:
        if states[1].shape[2] > 1000:
            found.append(tuple(rows.clone() for rows in states[:3]))
        return slot_attention(module, *states, **options)

    AttentionInterface.register(IMPLEMENTATION, spy)
    try:
        text = Path(__file__).parents[2].joinpath("README.md").read_text("utf-8")[:5000]
        PromptCacheEngine(lm, reuse="off").prefill(Prompt.from_text(text))
    finally:
        AttentionInterface.register(IMPLEMENTATION, slot_attention)
    assert found
    for states in found:
        states = (states[0][:, :, -32:], *states[1:])
        query, key, value = (rows.bfloat16() for rows in states)
        bias = torch.full((32, 32), -torch.inf).triu(1).bfloat16()
        bias = bias.repeat(query.shape[1] // key.shape[1], 1)
        whole = torch.nn.functional.pad(bias, (key.shape[2] - 32, 0))
        right = softmax_attention(*states, whole, 0.125)
        flash = attend(query, key, value, whole, 0.125)
        product = attend_by_matmul(query, key, value, bias, 0.125, Scratch())
        assert error(product, right) < 1.5 * error(flash, right)


@pytest.mark.parametrize("window", [None, 12])
def test_rows_that_a_kernel_takes_as_seen_by_all_are_hidden_from_nobody(
    tiny_lm: Callable[..., CausalLM], window: int | None
) -> None:
    buffers = tiny_lm("llama", seed=3).new_buffers(400)
    after_preamble = Span(0, 20, ((0, 7), (90, 110)))
    batches = [
        Batch.of_rows(buffers, [5] * 40, range(60, 100), range(60, 100)),
        Batch.of_rows(buffers, [5] * 4, [3, 4, 50, 51], [3, 4, 50, 51]),
        Batch.of_rows(buffers, [5] * 300, range(40, 340), range(40, 340)),
        Batch(buffers, [5] * 20, range(90, 110), range(7, 27), [after_preamble]),
    ]
    for batch in batches:
        for span in batch.spans:
            bias = batch.bias(span, window, 1, torch.float32)
            assert bias is not None
            seen = batch.seen_by_all(span, window)
            assert bool((bias[:, :seen] == 0).all())
            if window is None:
                # The first token itself is the last row that all of the span see.
                assert bool((bias[:, seen + 1] < 0).any())


def test_a_bias_of_the_rows_that_not_all_see_says_the_same(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    torch.manual_seed(0)
    lm = tiny_lm("llama", seed=3)
    batch = Batch.of_rows(lm.new_buffers(700), [5] * 40, range(600, 640), range(600, 640))
    (span,) = batch.spans
    query = (3 * torch.randn(1, 6, 40, 24)).bfloat16()
    key, value = (torch.randn(1, 2, 640, 24).bfloat16() for _ in range(2))
    bias = batch.bias(span, None, 3, torch.bfloat16)
    assert bias is not None
    last = batch.bias(span, None, 3, torch.bfloat16, batch.seen_by_all(span, None))
    assert last is not None
    assert last.shape[1] == 40
    right = softmax_attention(query, key, value, bias, 0.31)
    found = attend_by_matmul(query, key, value, last, 0.31, Scratch())
    assert error(found, right) < 1.5 * error(attend(query, key, value, bias, 0.31), right)
