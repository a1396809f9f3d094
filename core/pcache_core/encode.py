"""Offline encoding: module tokens to states, many in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pcache_core.kv import KVState, Slot
from pcache_core.lm import Batch, CausalLM, RowRange, Span, place
from pcache_core.passage import Passage

# Activations of more tokens than this fall out of a CPU's cache; a GPU wants more work at once.
_TOKENS_ON_CPU = 1024
_TOKENS_ON_GPU = 8192


@dataclass(frozen=True, slots=True)
class Module:
    """A passage to encode behind the anchor, its first token at `position`."""

    passage: Passage
    position: int

    @property
    def num_tokens(self) -> int:
        """Tokens to run through the model, those included that only stand in for others."""
        return len(self.passage.token_ids)


def encode_modules(
    lm: CausalLM, anchor: KVState | None, modules: Sequence[Module]
) -> Iterator[tuple[Module, KVState]]:
    """Encode modules, each seeing the anchor and itself; yields as batches finish.

    Modules of similar length share a forward, laid end to end without padding. The anchor's rows
    are attended to and dropped (anchored encoding).
    """
    for batch in _batches(lm, modules):
        yield from zip(batch, _encode_batch(lm, anchor, batch), strict=True)


def _batches(lm: CausalLM, modules: Sequence[Module]) -> Iterator[list[Module]]:
    most = _TOKENS_ON_CPU if lm.device.type == "cpu" else _TOKENS_ON_GPU
    batch: list[Module] = []
    tokens = 0
    for module in sorted(modules, key=lambda module: module.num_tokens):
        full = tokens + module.num_tokens > most
        if batch and (full or not lm.encodes_many):
            yield batch
            batch, tokens = [], 0
        batch.append(module)
        tokens += module.num_tokens
    if batch:
        yield batch


def _encode_batch(lm: CausalLM, anchor: KVState | None, modules: Sequence[Module]) -> list[KVState]:
    """One forward: the slot holds the anchor, then the modules one after another."""
    anchor_rows = anchor.num_tokens if anchor else 0
    slot = lm.new_slot(anchor_rows + sum(module.num_tokens for module in modules))
    if anchor:
        place(slot, 0, anchor, (None,) * len(lm.layers))
    input_ids: list[int] = []
    positions: list[int] = []
    spans = []
    for module in modules:
        start, stop = len(input_ids), len(input_ids) + module.num_tokens
        own = (anchor_rows + start, anchor_rows + stop)
        spans.append(Span(start, stop, _visible(anchor_rows, own)))
        input_ids.extend(module.passage.token_ids)
        positions.extend(module.passage.positions(module.position))
    rows = range(anchor_rows, anchor_rows + len(input_ids))
    lm.forward(Batch(slot, input_ids, rows, positions, spans))
    return [
        _state(slot, anchor_rows + span.start, module)
        for span, module in zip(spans, modules, strict=True)
    ]


def _state(slot: Slot, start: int, module: Module) -> KVState:
    """Copy a module's rows out, without those that only stood in for others."""
    passage = module.passage
    rows = [start + index for index in passage.kept]
    first = passage.positions(module.position)[passage.kept[0]]
    return slot.state_of(rows, passage.kept_ids, first)


def _visible(anchor_rows: int, own: RowRange) -> tuple[RowRange, ...]:
    """The anchor's rows and the module's own, as few ranges as possible."""
    if anchor_rows == 0:
        return (own,)
    return ((0, own[1]),) if own[0] == anchor_rows else ((0, anchor_rows), own)
