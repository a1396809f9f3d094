"""Models whose cache is not rows per token (recurrent, hybrid, indexed): run as they are."""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock
from typing import Any

import torch
from transformers import PreTrainedModel

from pcache_core.lm.forward import ModelCall, kept_logits


class StockRun:
    """One request through the model's own forward and, where it works, its own cache.

    A cache that gives other logits than a forward over everything is not used: each step then
    reads the whole text again.

    lock: held in a step, so that it takes turns with the model's other forwards.
    """

    def __init__(self, model: PreTrainedModel, lock: RLock, *, use_cache: bool) -> None:
        self._model = model
        self._lock = lock
        self._call = ModelCall(model)
        self._use_cache = use_cache
        self._cache: dict[str, Any] = {}
        self._token_ids: list[int] = []

    def __call__(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Append tokens; logits of the last, [vocab]."""
        with self._lock:
            return self._step(token_ids)

    def _step(self, token_ids: Sequence[int]) -> torch.Tensor:
        self._token_ids.extend(token_ids)
        new = token_ids if self._cache else self._token_ids
        input_ids = torch.tensor([list(new)], device=self._model.device)
        last = torch.tensor([len(new) - 1], device=self._model.device)
        output = self._call(last, input_ids=input_ids, **self._cache)
        if self._use_cache:
            self._cache = {
                name: getattr(output, name)
                for name in ("past_key_values", "cache_params")
                if getattr(output, name, None) is not None
            }
        return kept_logits(output, last)[-1]


def own_cache_works(model: PreTrainedModel, lock: RLock, token_ids: Sequence[int]) -> bool:
    """Whether a step with the model's own cache gives the logits of a forward over everything."""
    try:
        cached = StockRun(model, lock, use_cache=True)
        cached(token_ids[:-1])
        step = cached(token_ids[-1:])
        whole = StockRun(model, lock, use_cache=False)(token_ids)
    except Exception:
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 6e-2
    return bool((step - whole).norm() <= tolerance * whole.norm())
