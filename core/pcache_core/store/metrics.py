"""Stores' counts as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from pcache_core.errors import DependencyError, OptionError
from pcache_core.store.base import ModuleStore, StoreStats

try:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise DependencyError(
        "metrics need the prometheus_client package; pip install 'pcache-integrations[metrics]'"
    ) from error

_LABELS = ("store", "tier")
# Prometheus appends `_total` to counters.
_COUNTERS = {
    "hits": "Look-ups that found their state.",
    "misses": "Look-ups that found nothing usable.",
    "evictions": "States given up for room.",
    "damaged": "Entries dropped as altered, cut or another model's.",
    "load_ms": "Time spent in look-ups that hit.",
    "loaded_nbytes": "Bytes read by look-ups that hit.",
    "failures": "Calls that failed because the store could not be reached, read or written.",
}
_GAUGES = {
    "states": "States held.",
    "nbytes": "Bytes held.",
    "budget_bytes": "The most bytes it may hold.",
}


class StoreCollector(Collector):
    """Reads stores' counts whenever a registry asks for them; nothing is counted twice.

    stores: by the label `store` of their metrics. Each tier of a tiered store has its label `tier`.
    """

    def __init__(self, stores: Mapping[str, ModuleStore]) -> None:
        self._stores = dict(stores)

    def describe(self) -> Iterator[Metric]:
        """The metrics without values, by which a registry finds a second collector of them."""
        return self._metrics([])

    def collect(self) -> Iterator[Metric]:
        """`pcache_store_hits_total`, `pcache_store_bytes` and so on."""
        tiers = []
        for name, store in self._stores.items():
            stats = store.stats()
            tiers += [(name, tier) for tier in stats.tiers or (stats,)]
        return self._metrics(tiers)

    def _metrics(self, tiers: Sequence[tuple[str, StoreStats]]) -> Iterator[Metric]:
        for field, text in _COUNTERS.items():
            yield _filled(CounterMetricFamily(_metric(field), text, labels=_LABELS), field, tiers)
        for field, text in _GAUGES.items():
            yield _filled(GaugeMetricFamily(_metric(field), text, labels=_LABELS), field, tiers)


def register(stores: Mapping[str, ModuleStore], registry: CollectorRegistry) -> StoreCollector:
    """Add stores' metrics to a registry; `registry.unregister` takes them out again.

    Raises: OptionError: the registry has such metrics already.
    """
    collector = StoreCollector(stores)
    try:
        registry.register(collector)
    except ValueError as error:
        raise OptionError(
            "the registry has metrics of stores already; register all its stores together"
        ) from error
    return collector


def _metric(field: str) -> str:
    names = {"nbytes": "bytes", "load_ms": "load_milliseconds", "loaded_nbytes": "loaded_bytes"}
    return f"pcache_store_{names.get(field, field)}"


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily,
    field: str,
    tiers: Iterable[tuple[str, StoreStats]],
) -> Metric:
    for name, stats in tiers:
        value = getattr(stats, field)
        if value is not None:
            family.add_metric([name, stats.tier], value)
    return family
