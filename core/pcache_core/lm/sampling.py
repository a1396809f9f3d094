"""Choosing the next token, with transformers' own logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pcache_core.params import SamplingParams

if TYPE_CHECKING:
    from pcache_core.lm.constraint import Constraint

# Dividing logits by less overflows; the likeliest token then has all the probability anyway.
_GREEDY_BELOW = 1e-5


class Sampler:
    """Picks tokens for one request; repeatable with a seed.

    The processors and their order are those of transformers' `generate`. What a constraint does
    not allow is out before them.
    """

    def __init__(
        self, params: SamplingParams, device: torch.device, constraint: Constraint | None = None
    ) -> None:
        self._constraint = constraint
        self._greedy = params.temperature < _GREEDY_BELOW
        self._processors = LogitsProcessorList()
        if params.repetition_penalty != 1:
            self._processors.append(
                RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
            )
        if not self._greedy:
            self._add_warpers(params)
        self._generator = torch.Generator(device=device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def __call__(self, token_ids: Sequence[int], logits: torch.Tensor) -> int:
        """Choose the next token. token_ids: prompt and answer so far. logits: [vocab], fp32."""
        if self._constraint is None:
            return self._pick(token_ids, logits)
        return self._constraint.choose(logits, lambda allowed: self._pick(token_ids, allowed))

    def _pick(self, token_ids: Sequence[int], logits: torch.Tensor) -> int:
        scores = logits[None]
        if self._processors:
            ids = torch.tensor([list(token_ids)], device=logits.device).long()
            scores = self._processors(
                cast("torch.LongTensor", ids), cast("torch.FloatTensor", scores.clone())
            )
        if self._greedy:
            return int(scores.argmax(dim=-1))
        weights = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(weights, 1, generator=self._generator))

    def _add_warpers(self, params: SamplingParams) -> None:
        if params.temperature != 1:
            self._processors.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            self._processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._processors.append(TopPLogitsWarper(float(params.top_p)))
        if params.min_p > 0:
            self._processors.append(MinPLogitsWarper(float(params.min_p)))
