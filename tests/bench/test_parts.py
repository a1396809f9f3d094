"""The benchmark's parts: prompts, checks before timing, ratios, lines, memory."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pcache_core import CausalLM, MemoryStore, OptionError, PromptCacheEngine
from pcache_integrations.bench.check import WrongAnswerError, check_answers, warm_up
from pcache_integrations.bench.figures import Order, Sample
from pcache_integrations.bench.floor import Floor
from pcache_integrations.bench.growth import fill, fit_line
from pcache_integrations.bench.memory import MemoryNeededError, available_nbytes, check_memory
from pcache_integrations.bench.models import SIZES, parameter_count, random_llama
from pcache_integrations.bench.options import parse_modes, parse_orders, parse_sizes
from pcache_integrations.bench.summary import rows_of
from pcache_integrations.bench.ways import FLOOR, ModeWay, Way, floor_ways
from pcache_integrations.bench.workload import Words, Workload


def workload(lm: CausalLM, *, cached_tokens: int = 128, documents: int = 4) -> Workload:
    rng = random.Random(5)
    return Workload(
        Words(lm, rng), rng, cached_tokens=cached_tokens, documents=documents, question_tokens=9
    )


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
    lm = random_llama("llama-tiny", dtype=dtype, device="cpu", context_tokens=512, seed=0)
    prompts = workload(lm).round()
    engines = {mode: PromptCacheEngine(lm) for mode in ("off", "exact")}
    warm_up(engines, prompts)
    check_answers(engines, Floor(lm, engines["off"].tokenise(prompts.same)), prompts)
    for wrong in (prompts.first, prompts.new):
        floor = Floor(lm, engines["off"].tokenise(wrong))
        with pytest.raises(WrongAnswerError, match="a forward over keys and values in place"):
            check_answers(engines, floor, prompts)


def test_states_that_fill_a_store_are_kept_and_never_used(tiny_llama: CausalLM) -> None:
    store = MemoryStore()
    fill(store, tiny_llama, 50, "bench-test")
    assert store.stats().states == 50
    assert store.stats().nbytes == 50 * tiny_llama.bytes_per_token
    engine = PromptCacheEngine(tiny_llama, store, "fast", namespace="bench-test")
    report = engine.prefill(workload(tiny_llama).round().first).report
    assert report.cached_tokens == 0


def test_ratios_are_medians_of_each_rounds_own(tiny_llama: CausalLM) -> None:
    engine = PromptCacheEngine(tiny_llama)
    prompt = workload(tiny_llama).round().first
    floors = floor_ways(Floor(tiny_llama, engine.tokenise(prompt)))
    fast_orders: tuple[Order, ...] = ("new",)
    ways: list[Way] = [
        ModeWay("off", engine, 4, ("cold",)),
        ModeWay("fast", engine, 4, fast_orders),
        *floors,
    ]

    def samples(*ttft_ms: float | None) -> list[Sample | None]:
        parts = {"forward": 1.0}
        return [
            ms and Sample(ms, 150, 140, decode_tokens_per_s=10, parts_ms=parts) for ms in ttft_ms
        ]

    rows = rows_of(
        128,
        ways,
        {
            ("off", "cold"): samples(100, 400, 90),
            ("fast", "new"): samples(10, 20, None),
            (FLOOR, "floor"): samples(5, 20, 3),
            (floors[1].name, "floor"): samples(None, None, None),
        },
    )
    by_way = {row.way: row for row in rows}
    assert set(by_way) == {"off", "fast", FLOOR}
    fast = by_way["fast"]
    assert (fast.ttft_ms.p50, fast.ttft_ms.min, fast.ttft_ms.max) == (15, 10, 20)
    assert fast.speedup == 15  # of 10 and 20, and not 100 / 15
    assert fast.above_floor == 1.5
    assert by_way["off"].speedup == 1


def test_a_line_is_numpys_least_squares() -> None:
    rng = np.random.default_rng(1)
    tokens = np.array([1024, 2048, 4096, 8192, 16384])
    ttft_ms = 30 + 0.011 * tokens + rng.normal(0, 4, 5)
    line = fit_line("fast", list(zip(tokens.tolist(), ttft_ms.tolist(), strict=True)))
    slope, intercept = np.polyfit(tokens, ttft_ms, 1)
    residual = ttft_ms - (slope * tokens + intercept)
    r_squared = 1 - residual.var() / ttft_ms.var()
    assert line.us_per_token == pytest.approx(1000 * slope)
    assert line.intercept_ms == pytest.approx(intercept)
    assert line.r_squared == pytest.approx(r_squared)
    assert line.r_squared < 1


def test_a_random_model_is_as_large_as_its_size_says(tiny_llama: CausalLM) -> None:
    size = SIZES["llama-tiny"]
    norms = (2 * size.layers + 1) * size.hidden
    assert parameter_count(tiny_llama) == size.parameters + norms
    assert tiny_llama.bytes_per_token == 4 * size.cached_numbers_per_token
    billions = {name: round(size.parameters / 1e9, 2) for name, size in SIZES.items()}
    assert billions == {
        "llama-tiny": 0.01, "llama-115m": 0.12, "llama-0.5b": 0.51, "llama-1b": 1.1,
        "llama-7b": 6.74,
    }  # fmt: skip


def test_a_random_models_matrices_have_no_two_rows_alike(tiny_llama: CausalLM) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = tiny_llama.model.state_dict()[name]
        assert len(torch.unique(rows, dim=0)) == len(rows)
    frequencies = tiny_llama.model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    expected = 10_000.0 ** -(torch.arange(16) / 16)
    torch.testing.assert_close(frequencies, expected)


def test_a_benchmark_that_does_not_fit_says_what_it_needs() -> None:
    available = available_nbytes("cpu")
    if available is None:
        pytest.skip("this system does not tell how much memory is free")
    check_memory({"weights": available // 2}, "cpu")
    needed = {"weights": available, "slots": 10**9, "peers": 0}
    with pytest.raises(MemoryNeededError, match=r"needs .* GB \(weights .* GB, slots 1\.0 GB\)"):
        check_memory(needed, "cpu")


def test_sizes_modes_and_orders_are_lists() -> None:
    assert parse_sizes("2k, 1000,1K,2048") == (1000, 1024, 2048)
    assert parse_modes("fast,off, exact,fast") == ("fast", "exact")
    assert parse_orders("new,same") == ("same", "new")
    with pytest.raises(OptionError, match="unknown reuse mode 'quick'"):
        parse_modes("quick")


def test_workers_import_only_their_peer_and_the_standard_library() -> None:
    import ast
    import sys

    import pcache_integrations.bench as package

    peers = {"torch", "transformers", "langchain_huggingface", "llama_cpp", "vllm", "worker_loop"}
    folder = Path(package.__file__).parent / "workers"
    for file in folder.glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
        roots = {name.partition(".")[0] for name in names}
        assert roots <= peers | set(sys.stdlib_module_names), file.name
