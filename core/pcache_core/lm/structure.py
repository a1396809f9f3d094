"""What a model's configuration says about its cache: layers, windows, context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

try:  # what stands in a cache for a layer that shares another layer's keys and values
    from transformers.cache_utils import DummyLayer as DummyLayer
except ImportError:  # older versions, which vLLM may ask for, leave such layers out of the cache

    class DummyLayer:  # type: ignore[no-redef]
        """No layer of a cache is one."""


# Compared by exact type: subclasses (indexed layers) keep more than keys and values per token.
_PER_TOKEN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class CacheStructure:
    """How each layer caches.

    caching: whether the layer keeps keys and values of its own (some share another layer's).
    windows: layer index to how many positions back the layer sees; None for all.
    is_chunked: some layer attends within fixed chunks of the context.
    refusal: why states per token don't exist in this model; None if they do.
    """

    caching: tuple[bool, ...]
    windows: dict[int, int | None]
    is_chunked: bool
    refusal: str | None


def cache_structure(model: PreTrainedModel) -> CacheStructure:
    """Read the structure off the cache that transformers itself builds for the model."""
    config = text_config(model)
    layers = DynamicCache(config=config).layers
    if len(layers) == 0:
        return CacheStructure((), {}, is_chunked=False, refusal="the model has no cache layers")
    for index, layer in enumerate(layers):
        if type(layer) not in _PER_TOKEN_LAYERS:
            reason = f"layer {index} caches a {type(layer).__name__}, not keys and values per token"
            return CacheStructure((), {}, is_chunked=False, refusal=reason)
    kinds = getattr(config, "layer_types", None) or [type(layer).__name__ for layer in layers]
    windows_by_kind = {
        kind: getattr(layer, "sliding_window", None)
        for kind, layer in zip(kinds, layers, strict=True)
        if not isinstance(layer, DummyLayer)
    }
    return CacheStructure(
        caching=tuple(not isinstance(layer, DummyLayer) for layer in layers),
        windows={index: windows_by_kind[kind] for index, kind in enumerate(kinds)},
        is_chunked="chunked_attention" in kinds
        or getattr(config, "attention_chunk_size", None) is not None,
        refusal=None,
    )


def text_config(model: PreTrainedModel) -> Any:
    """Return the configuration of the text decoder."""
    return model.config.get_text_config(decoder=True)


def context_length(model: PreTrainedModel) -> int | None:
    """Most positions the model accepts; None where the configuration names no limit."""
    return context_length_by(model.config)


def context_length_by(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model of this configuration accepts; None without a limit."""
    config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return int(limit * max([1.0, *_factors(config, "dynamic")]))
    return None


def has_window(config: Any) -> bool:
    """Whether some layer sees a limited number of tokens back, as far as the configuration says."""
    return any(getattr(config, name, None) for name in ("sliding_window", "window_size"))


def stable_length(model: PreTrainedModel) -> int | None:
    """Positions up to which rotary frequencies don't depend on the prompt's length; None for all.

    Dynamic NTK and LongRoPE change every frequency once a prompt passes the original context, so
    states encoded before that don't fit a longer prompt.
    """
    config = text_config(model)
    limits = [
        parameters.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for parameters in _rope_parameters(config)
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE
    ]
    return min(limits) if limits else None


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return one dict of rotary parameters, or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _factors(config: Any, rope_type: str) -> list[float]:
    return [
        float(parameters.get("factor") or 1.0)
        for parameters in _rope_parameters(config)
        if parameters.get("rope_type") == rope_type
    ]
