"""What an engine counts, and how Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from pcache_core import (
    CausalLM,
    DiskStore,
    MemoryStore,
    OptionError,
    Prompt,
    PromptCacheEngine,
    Report,
    SamplingParams,
    Segment,
    TieredStore,
)
from pcache_core.base_engine import Reports
from pcache_core.metrics import register
from pcache_core.store import StoreStats

OPENING = Segment("Answer from the notes.\n", "literal")
BEES = Segment("Ann keeps bees in Oslo, and sells honey.", "document", "bees")
MILL = Segment("The mill by the lake burned down in May.", "document", "mill")
ONE = Prompt([OPENING, BEES, Segment("\nWho? A:")])
TWO = Prompt([OPENING, MILL, BEES, Segment("\nWhere? A:")])


@pytest.fixture(scope="module")
def lm(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm()


@pytest.fixture
def engine(lm: CausalLM, tmp_path: Path) -> PromptCacheEngine:
    store = TieredStore([MemoryStore(), DiskStore(tmp_path)])
    return PromptCacheEngine(lm, store, "fast")


def test_totals_are_sums_over_all_reports_and_the_store_counts_beside_them(
    engine: PromptCacheEngine,
) -> None:
    engine.encode([MILL.text], progress=False)
    ahead = engine.lm.count_tokens(MILL.text)
    assert engine.stats().encoded_tokens == ahead
    reports = [
        engine.prefill(ONE).report,
        engine.generate(TWO, SamplingParams(max_tokens=40, repetition_penalty=0.3)).report,
        engine.prefill(TWO, reuse="off").report,
    ]
    stats = engine.stats()
    assert isinstance(stats, StoreStats)
    assert stats.requests == 3
    for name in (
        "prompt_tokens", "cached_tokens", "computed_tokens", "generated_tokens", "drafted_tokens",
        "accepted_tokens",
    ):  # fmt: skip
        assert getattr(stats, name) == sum(getattr(report, name) for report in reports)
    assert stats.cached_tokens > 0
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.encoded_tokens == ahead + sum(report.encoded_tokens for report in reports)
    assert stats.encode_ms > 0
    assert stats.prefill_ms == pytest.approx(sum(report.prefill_ms for report in reports))
    in_store = engine.store.stats()
    assert (stats.hits, stats.misses, stats.tiers) == (
        in_store.hits, in_store.misses, in_store.tiers,
    )  # fmt: skip
    assert stats.states == 3


def test_totals_go_on_when_reports_are_forgotten(engine: PromptCacheEngine) -> None:
    report = engine.prefill(ONE).report
    for _ in range(300):
        engine.reports.append(report)
    assert len(engine.reports) == 256
    assert engine.stats().requests == 301


def test_a_scrape_shows_tokens_and_times_by_engine_and_hits_by_tier(
    lm: CausalLM, engine: PromptCacheEngine, tmp_path: Path
) -> None:
    registry = CollectorRegistry()
    other = PromptCacheEngine(lm, DiskStore(tmp_path), "fast")
    collector = register({"main": engine, "other": other}, registry)
    engine.prefill(ONE)
    engine.prefill(TWO)
    assert isinstance(engine.store, TieredStore)
    engine.store.flush()
    other.prefill(TWO)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"pcache_{name}", labels)

    stats = engine.stats()
    assert value("requests_total", engine="main") == 2
    for kind in ("cached", "encoded", "computed", "generated", "repaired"):
        tokens = value("tokens_total", engine="main", kind=kind)
        assert tokens == getattr(stats, f"{kind}_tokens")
    assert value("milliseconds_total", engine="main", work="encode") == stats.encode_ms > 0
    assert value("store_hits_total", store="main", tier="memory") == stats.tiers[0].hits > 0
    assert value("store_hits_total", store="other", tier="disk") == 3
    assert value("store_loaded_bytes_total", store="other", tier="disk") == sum(
        path.stat().st_size for path in tmp_path.rglob("*.safetensors")
    )
    with pytest.raises(OptionError, match="register all engines together"):
        register({"third": other}, registry)
    registry.unregister(collector)
    register({"third": other}, registry)


def test_reports_are_read_while_requests_end() -> None:
    reports, ended = Reports(), Report((), 1, 0, 0, 1, "off")
    for _ in range(3):
        reports.append(ended)
    read = []
    for report in reports:
        read.append(report)
        reports.append(ended)
    assert (len(read), len(reports), len(reports[-4:])) == (3, 6, 4)
