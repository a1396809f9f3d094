"""Running an unmodified transformers model over buffers, in one of two ways.

`RaggedForward` is the main path: our attention function sees the tokens of all requests at once.
`SequentialForward` is for models whose attention can't be replaced: each contiguous run of new
tokens is one ordinary forward with the model's own attention and masks, in the prompt's order.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from pcache_core.kv.sequence import KVBuffers
from pcache_core.lm.attention import IMPLEMENTATION, AttentionLayers
from pcache_core.lm.batch import Batch
from pcache_core.lm.ragged import RaggedBatch, slot_cache
from pcache_core.lm.relocation import Rotations
from pcache_core.lm.structure import CacheStructure, text_config


class Forward(Protocol):
    """Runs batches of different sequences, filling their rows.

    takes_many_spans: a batch may hold several spans. merges: several batches make one forward.
    windows_by_position: sliding windows follow positions, wherever the rows are.
    """

    takes_many_spans: bool
    merges: bool
    windows_by_position: bool

    @property
    def lends(self) -> bool:
        """Whether batches may have states on loan."""

    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Logits of each batch's last tokens, [num_logits, vocab] fp32."""


class RaggedForward:
    """One forward for all batches, through our attention function."""

    takes_many_spans = True
    windows_by_position = True

    def __init__(self, model: PreTrainedModel, structure: CacheStructure) -> None:
        self._call = ModelCall(model)
        self._caching = structure.caching
        self.layers = AttentionLayers(structure.windows)
        self._config = text_config(model)
        self._users_choice: str | None = self._config._attn_implementation
        self.merges = True

    @property
    def lends(self) -> bool:
        """Known only after the self-test has tried it."""
        return self.layers.rotations is not None

    def may_lend(self, rotations: Rotations) -> bool:
        """Whether trying it makes sense: keys alone turn, in every layer, and all see all rows."""
        parts = {rotation.part for rotation in rotations if rotation is not None}
        windows = any(window is not None for window in self.layers.windows.values())
        return self.merges and all(self._caching) and not windows and parts <= {"keys"}

    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Logits of each batch's last tokens, [num_logits, vocab] fp32."""
        if len(batches) > 1 and not self.merges:
            return [logits for batch in batches for logits in self([batch])]
        ragged = RaggedBatch(batches)
        chosen = self._config._attn_implementation
        if chosen != IMPLEMENTATION:  # else an interrupt or a fork came before it was set back
            self._users_choice = chosen
        try:
            self._config._attn_implementation = IMPLEMENTATION
            output = self._call(
                ragged.kept,
                input_ids=ragged.input_ids[None],
                position_ids=ragged.positions[None],
                past_key_values=slot_cache(ragged, self._caching),
                pcache_batch=ragged,
                pcache_layers=self.layers,
            )
        finally:
            self._config._attn_implementation = self._users_choice
        logits = kept_logits(output, ragged.kept)
        return list(torch.split_with_sizes(logits, [batch.num_logits for batch in batches]))


class SequentialForward:
    """One forward for each contiguous run of a batch, through the model's own attention."""

    takes_many_spans = False
    merges = False
    lends = False
    windows_by_position = False

    def __init__(self, model: PreTrainedModel, structure: CacheStructure) -> None:
        self._call = ModelCall(model)
        self._caching = structure.caching

    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Logits of each batch's last tokens, [num_logits, vocab] fp32."""
        return [self._run(batch) for batch in batches]

    def _run(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor | None = None
        for run in _contiguous_runs(batch):
            ragged = RaggedBatch([run])
            output = self._call(
                ragged.kept,
                input_ids=run.input_ids[None],
                position_ids=run.positions[None],
                past_key_values=slot_cache(ragged, self._caching),
            )
            logits = kept_logits(output, ragged.kept)
        assert logits is not None
        return logits


class ModelCall:
    """Calls a model's forward, leaving out the optional arguments it does not take."""

    def __init__(self, model: PreTrainedModel) -> None:
        parameters = inspect.signature(model.forward).parameters
        self._model = model
        self._takes_positions = "position_ids" in parameters
        self._keeps_some = "logits_to_keep" in parameters

    @torch.inference_mode()  # its operations cost less than those of `no_grad`
    def __call__(self, kept: torch.Tensor, **arguments: Any) -> Any:
        """The model's output; logits of at least the tokens at the indices `kept`, ascending."""
        if not self._takes_positions:
            arguments.pop("position_ids", None)
        if self._keeps_some:
            arguments["logits_to_keep"] = 1 if len(kept) == 1 else kept
        device_type = self._model.device.type
        with _evaluating(self._model), torch.autocast(device_type, enabled=False):
            return self._model(**arguments, use_cache=True)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, nothing is dropped at random, also amid a training loop."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def kept_logits(output: Any, kept: torch.Tensor) -> torch.Tensor:
    """[kept, vocab], fp32, of the tokens at the indices `kept`, of a batch of one row."""
    logits: torch.Tensor = output.logits[0]
    if logits.shape[0] != len(kept):
        logits = logits[kept]
    return logits.to(torch.float32, copy=True)  # a copy may be changed in place


def runs_of(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending rows as contiguous ranges (start, stop)."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def _contiguous_runs(batch: Batch) -> Iterator[Batch]:
    ids, rows, positions = batch.input_ids.tolist(), batch.rows.tolist(), batch.positions.tolist()
    first = 0
    for start, stop in runs_of(rows):
        part = slice(first, first + stop - start)
        num_logits = batch.num_logits if part.stop == batch.num_tokens else 1
        yield Batch.of_rows(
            batch.buffers, ids[part], rows[part], positions[part], num_logits=num_logits
        )
        first = part.stop


def fill(
    forward: Forward, buffers: KVBuffers, token_ids: Sequence[int], start: int
) -> torch.Tensor:
    """Compute a contiguous run of tokens at rows and positions `start …`; logits of the last."""
    rows = range(start, start + len(token_ids))
    [logits] = forward([Batch.of_rows(buffers, token_ids, rows, rows)])
    return logits[-1]
