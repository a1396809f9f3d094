"""Engines' and stores' counts as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from pcache_core.engine import PromptCacheEngine
from pcache_core.errors import DependencyError, OptionError
from pcache_core.report import StoreStats

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
_TOKENS = {
    "cached": "cached_tokens",
    "encoded": "encoded_tokens",
    "computed": "computed_tokens",
    "repaired": "repaired_tokens",
    "generated": "generated_tokens",
    "drafted": "drafted_tokens",
    "accepted": "accepted_tokens",
}
_TIMES = {"encode": "encode_ms", "prefill": "prefill_ms", "repair": "repair_ms"}


class EngineCollector(Collector):
    """Reads engines' counts whenever a registry asks for them; nothing is counted twice.

    engines: by the label `engine`; their stores have the same name as the label `store`, and each
        tier of a tiered store has its label `tier`.
    """

    def __init__(self, engines: Mapping[str, PromptCacheEngine]) -> None:
        self._engines = dict(engines)

    def describe(self) -> Iterator[Metric]:
        """The metrics without values, by which a registry finds a second collector of them."""
        yield from (*_store_metrics([]), *_families())

    def collect(self) -> Iterator[Metric]:
        """`pcache_requests_total`, `pcache_tokens_total`, `pcache_store_hits_total` and so on."""
        tiers = []
        requests, tokens, times = _families()
        for name, engine in self._engines.items():
            stats = engine.stats()
            tiers += [(name, tier) for tier in stats.tiers or (stats,)]
            requests.add_metric([name], stats.requests)
            for kind, field in _TOKENS.items():
                tokens.add_metric([name, kind], getattr(stats, field))
            for work, field in _TIMES.items():
                times.add_metric([name, work], getattr(stats, field))
        yield from (*_store_metrics(tiers), requests, tokens, times)


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


def _store_metrics(tiers: Sequence[tuple[str, StoreStats]]) -> Iterator[Metric]:
    for field, text in _COUNTERS.items():
        yield _filled(CounterMetricFamily(_metric(field), text, labels=_LABELS), field, tiers)
    for field, text in _GAUGES.items():
        yield _filled(GaugeMetricFamily(_metric(field), text, labels=_LABELS), field, tiers)


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
