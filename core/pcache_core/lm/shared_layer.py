"""What stands in a cache for a layer that shares another layer's keys and values."""

from __future__ import annotations

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # older versions, which vLLM may ask for, leave such layers out of the cache

    class DummyLayer:  # type: ignore[no-redef]
        """No layer of a cache is one."""


__all__ = ["DummyLayer"]
