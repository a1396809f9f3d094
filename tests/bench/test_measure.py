"""The benchmark's parts: prompts, checks before timing, ratios, random models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pcache_core import CausalLM, OptionError, PromptCacheEngine, PromptCacheError
from pcache_core.params import ReuseMode
from pcache_integrations.bench.measure import Floor, check_answers
from pcache_integrations.bench.models import SIZES, random_llama
from pcache_integrations.bench.results import FLOOR, Sample, Way, rows_of
from pcache_integrations.bench.workload import Workload
from pcache_integrations.cli.bench import parse_modes, parse_orders, parse_sizes


def workload(lm: CausalLM) -> Workload:
    return Workload(lm, 5, documents=4, document_tokens=32, question_tokens=9)


def test_prompts_have_the_asked_number_of_tokens(tiny_llama: CausalLM) -> None:
    engine = PromptCacheEngine(tiny_llama)
    prompts = workload(tiny_llama).round()
    for prompt in (prompts.first, prompts.same, prompts.new):
        pieces = engine.tokenise(prompt).pieces
        documents = [p.stop - p.start for p in pieces if p.segment.kind == "document"]
        assert documents == [32] * 4
        # As a library reads it that tokenises the whole text.
        whole = tiny_llama.tokenizer(prompt.text)["input_ids"]
        assert list(engine.tokenise(prompt).token_ids) == whole


def test_orders_differ_from_the_first_document_on(tiny_llama: CausalLM) -> None:
    work = workload(tiny_llama)
    rounds = [work.round(), work.round()]
    for prompts in rounds:
        assert prompts.first.segments[:-1] == prompts.same.segments[:-1]
        assert prompts.first.segments[-1] != prompts.same.segments[-1]
    starts = [p.segments[1] for each in rounds for p in (each.first, each.new)]
    assert len(set(starts)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_floor_and_a_repeated_prefix_are_checked_against_off(dtype: torch.dtype) -> None:
    lm = random_llama("llama-tiny", dtype, context_tokens=512, seed=0)
    prompts = workload(lm).round()
    modes: tuple[ReuseMode, ...] = ("off", "exact")
    engines = {mode: PromptCacheEngine(lm) for mode in modes}
    assert check_answers(engines, Floor(lm, engines["off"].tokenise(prompts.same)), prompts) == []
    for wrong in (prompts.first, prompts.new):
        floor = Floor(lm, engines["off"].tokenise(wrong))
        with pytest.raises(PromptCacheError, match="a forward over keys and values in place"):
            check_answers(engines, floor, prompts)


def test_ratios_are_medians_of_each_rounds_own() -> None:
    def samples(*ttft_ms: float | None) -> list[Sample | None]:
        return [ms and Sample(ms, 150, 140, decode_tokens_per_s=10) for ms in ttft_ms]

    ways = [
        Way("off", "ours", ("cold",), lambda _: None),
        Way("fast", "ours", ("new",), lambda _: None),
        Way("vLLM", "peer", ("new",), lambda _: None),
        Way(FLOOR, "floor", ("floor",), lambda _: None),
    ]
    rows = rows_of(
        128,
        ways,
        {
            ("off", "cold"): samples(100, 400, 90),
            ("fast", "new"): samples(10, 20, None),
            ("vLLM", "new"): samples(None, None, None),
            (FLOOR, "floor"): samples(5, 20, 3),
        },
    )
    by_way = {row.way: row for row in rows}
    assert set(by_way) == {"off", "fast", FLOOR}
    fast = by_way["fast"]
    assert (fast.ttft_ms.p50, fast.ttft_ms.min, fast.ttft_ms.max) == (15, 10, 20)
    assert fast.speedup == 15  # of 10 and 20, and not 100 / 15
    assert fast.above_floor == 1.5
    assert by_way["off"].speedup == 1


def test_a_random_models_weights_are_drawn_as_its_dimensions_say(tiny_llama: CausalLM) -> None:
    attention = 128 * 128 * 2 + 128 * 64 * 2  # two heads of keys and values, four of queries
    norms = (2 * 2 + 1) * 128
    expected = 2 * (attention + 3 * 128 * 256) + 2 * 32_000 * 128 + norms
    weights = tiny_llama.model.state_dict()
    assert sum(weight.numel() for weight in weights.values()) == expected
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(torch.unique(weights[name], dim=0)) == 32_000
    assert float(weights["lm_head.weight"].std()) == pytest.approx(128**-0.5, rel=0.01)
    frequencies = tiny_llama.model.model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 10_000.0 ** -(torch.arange(16) / 16))
    other = random_llama("llama-tiny", torch.float32, context_tokens=1024, seed=1)
    assert not torch.equal(other.model.lm_head.weight, weights["lm_head.weight"])


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux's /proc")
def test_a_random_model_that_does_not_fit_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SIZES, "llama-huge", (2**17, 2**19, 4, 4, 4))
    layer = 4 * 2**34 + 3 * 2**36  # four square matrices, and three of the feed forward
    gigabytes = 2 * (4 * layer + 2 * 32_000 * 2**17) // 10**9
    with pytest.raises(OptionError, match=rf"llama-huge needs {gigabytes}\.\d GB for weights"):
        random_llama("llama-huge", torch.bfloat16, context_tokens=64, seed=0)


def test_sizes_modes_and_orders_are_lists() -> None:
    assert parse_sizes("2k, 1000,1K,2048") == (1000, 1024, 2048)
    assert parse_modes("fast,off, exact,fast") == ("fast", "exact")
    assert parse_orders("new,same") == ("same", "new")
