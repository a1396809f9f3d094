"""Engines' counts as Prometheus metrics, those of their stores included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

# The store's metrics module says what to install where this fails.
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from pcache_core.engine import PromptCacheEngine
from pcache_core.errors import OptionError
from pcache_core.store.metrics import StoreCollector

_TOKENS = {
    "cached": "cached_tokens",
    "encoded": "encoded_tokens",
    "computed": "computed_tokens",
    "repaired": "repaired_tokens",
    "generated": "generated_tokens",
}
_TIMES = {"encode": "encode_ms", "prefill": "prefill_ms", "repair": "repair_ms"}


class EngineCollector(Collector):
    """Reads engines' counts whenever a registry asks for them; nothing is counted twice.

    engines: by the label `engine`; their stores have the same name as the label `store`.
    """

    def __init__(self, engines: Mapping[str, PromptCacheEngine]) -> None:
        self._engines = dict(engines)
        self._stores = StoreCollector({name: each.store for name, each in engines.items()})

    def describe(self) -> Iterator[Metric]:
        """The metrics without values, by which a registry finds a second collector of them."""
        yield from self._stores.describe()
        yield from _families()

    def collect(self) -> Iterator[Metric]:
        """`pcache_requests_total`, `pcache_tokens_total`, `pcache_store_hits_total` and so on."""
        yield from self._stores.collect()
        requests, tokens, times = _families()
        for name, engine in self._engines.items():
            stats = engine.stats()
            requests.add_metric([name], stats.requests)
            for kind, field in _TOKENS.items():
                tokens.add_metric([name, kind], getattr(stats, field))
            for work, field in _TIMES.items():
                times.add_metric([name, work], getattr(stats, field))
        yield from (requests, tokens, times)


def register(
    engines: Mapping[str, PromptCacheEngine], registry: CollectorRegistry
) -> EngineCollector:
    """Add engines' metrics to a registry; `registry.unregister` takes them out again.

    Raises: OptionError: the registry has such metrics already.
    """
    collector = EngineCollector(engines)
    try:
        registry.register(collector)
    except ValueError as error:
        raise OptionError(
            "the registry has metrics of engines or stores already; register all engines together, "
            "and their stores with them"
        ) from error
    return collector


def _families() -> tuple[CounterMetricFamily, CounterMetricFamily, CounterMetricFamily]:
    """Without values. Prometheus appends `_total`."""
    return (
        CounterMetricFamily("pcache_requests", "Finished requests.", labels=("engine",)),
        CounterMetricFamily(
            "pcache_tokens",
            "Tokens by what became of them: cached ones were saved from being computed; those not "
            "loaded are computed ones whose state was there.",
            labels=("engine", "kind"),
        ),
        CounterMetricFamily(
            "pcache_milliseconds", "Time spent in the model.", labels=("engine", "work")
        ),
    )
