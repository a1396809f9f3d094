"""The floor: a bare forward of the tokens that no state can hold."""

from __future__ import annotations

import time

import torch

from pcache_core import CausalLM
from pcache_core.kv.buffers import KVBuffers
from pcache_core.lm import Batch
from pcache_core.tokens import TokenisedPrompt


class Floor:
    """Buffers that hold a whole prompt, and the forward of its last segment: the question.

    prompt_tokens: of the whole prompt; cached_tokens: of what stands before the question.
    """

    def __init__(self, lm: CausalLM, prompt: TokenisedPrompt) -> None:
        self._lm = lm
        self._ids = list(prompt.token_ids)
        self.prompt_tokens = len(self._ids)
        self.cached_tokens = prompt.pieces[-1].start
        self._slot = lm.new_buffers(self.prompt_tokens)
        self._small_slot = lm.new_buffers(self.prompt_tokens - self.cached_tokens)
        self._forward(self._slot, 0, 0)

    def in_place_ms(self) -> float:
        """The forward over everything before, whose keys and values are in the buffers."""
        return self._timed(self._slot, self.cached_tokens)

    def alone_ms(self) -> float:
        """The forward of the same tokens as if nothing stood before them."""
        return self._timed(self._small_slot, 0)

    def last_logits(self) -> torch.Tensor:
        """What `in_place_ms` computes, [vocab] fp32."""
        return self._forward(self._slot, self.cached_tokens, self.cached_tokens)

    def _timed(self, buffers: KVBuffers, first_row: int) -> float:
        started = time.perf_counter()
        logits = self._forward(buffers, self.cached_tokens, first_row)
        logits.argmax().item()  # on an accelerator, waits until it is there
        return (time.perf_counter() - started) * 1000

    def _forward(self, buffers: KVBuffers, first_token: int, first_row: int) -> torch.Tensor:
        ids = self._ids[first_token:]
        rows = range(first_row, first_row + len(ids))
        return self._lm.forward(Batch.of_rows(buffers, ids, rows, rows))
