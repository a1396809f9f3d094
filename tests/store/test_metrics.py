"""Metrics: what a scrape reads is what happened, tier by tier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from pcache_core import CausalLM, DiskStore, MemoryStore, PromptCacheEngine, TieredStore
from pcache_core.metrics import register
from stored_states import make


def test_a_scrape_shows_hits_misses_and_bytes_by_tier(
    tmp_path: Path, tiny_lm: Callable[..., CausalLM]
) -> None:
    disk = DiskStore(tmp_path, budget_bytes=10**6)
    key, state = make(1, 2)
    disk.put(key, state)
    store = TieredStore([MemoryStore(10**5), disk])
    registry = CollectorRegistry()
    register({"corpus": PromptCacheEngine(tiny_lm("llama"), store)}, registry)
    for _ in range(3):
        store.get(key)
    store.get(make(7, 7)[0])

    def value(name: str, tier: str) -> float | None:
        return registry.get_sample_value(f"pcache_store_{name}", {"store": "corpus", "tier": tier})

    assert [value("hits_total", tier) for tier in ("memory", "disk")] == [2, 1]
    assert [value("misses_total", tier) for tier in ("memory", "disk")] == [2, 1]
    assert value("bytes", "memory") == state.nbytes
    assert value("bytes", "disk") == sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))
    assert value("budget_bytes", "disk") == 10**6
    elapsed = value("load_milliseconds_total", "disk")
    assert elapsed is not None
    assert 0 < elapsed < 60_000
    assert b"pcache_store_evictions_total" in generate_latest(registry)


def test_stores_of_one_registry_are_told_apart(tiny_lm: Callable[..., CausalLM]) -> None:
    registry = CollectorRegistry()
    stores = {"one": MemoryStore(10_000), "two": MemoryStore(20_000)}
    lm = tiny_lm("llama")
    register({name: PromptCacheEngine(lm, store) for name, store in stores.items()}, registry)
    budgets = [
        registry.get_sample_value("pcache_store_budget_bytes", {"store": name, "tier": "memory"})
        for name in stores
    ]
    assert budgets == [10_000, 20_000]
